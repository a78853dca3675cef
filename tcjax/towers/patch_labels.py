"""A tower with a linear head per patch: what a patch shows and where it lies. Trains a small tower in minutes.

    loss = sum over patches and kinds of cross-entropy(head_kind(token), label_kind)

The data gives one label per patch for every kind in `kinds` (digit, colour); two kinds more, the patch's row and column,
follow from the grid: a decoder behind a frozen tower can only bind content to place if the tokens still carry their place.
The heads are thrown away afterwards. Cost: N * C * (sum of kinds + H + W) per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax import loss
from tcjax.batch import Batch
from tcjax.nn.dense import dense
from tcjax.towers.vit import Vit, VitConfig


@dataclass(frozen=True, kw_only=True)
class PatchLabelsConfig:
    """kinds: number of classes of each kind of label the data gives, e.g. (11, 7): ten digits and none, six colours and none."""

    tower: VitConfig
    kinds: tuple[int, ...]

    def __post_init__(self):
        if self.tower.keep_class:
            raise ValueError(
                "tower.keep_class=True, but labels belong to patches; train the tower with keep_class=False, its weights "
                "are the same."
            )
        if self.tower.ragged:
            raise ValueError(
                f"the labels lie on one grid, and this tower reads images of any shape (pixels.geometry="
                f"{self.tower.pixels.geometry!r}); train a tower of fixed resolution."
            )

    @property
    def num_queries(self) -> int:
        """No LLM reads these tokens."""
        return 0

    @property
    def labelled_patch(self) -> int:
        """Side in pixels of the patches whose dense labels the data must give."""
        return self.tower.patch

    def build(self, rngs: nnx.Rngs) -> PatchLabels:
        return PatchLabels(self, rngs=rngs)


class PatchLabels(nnx.Module):
    def __init__(self, config: PatchLabelsConfig, *, rngs: nnx.Rngs):
        self.kinds = config.kinds + config.tower.grid_HW
        self.grid_HW = config.tower.grid_HW
        self.tower: Vit = config.tower.build(rngs)
        self.head = dense("CV", config.tower.width, sum(self.kinds), rngs=rngs)

    def loss_terms(self, batch: Batch, key: jax.Array | None = None, progress: jax.Array | None = None) -> loss.Terms:
        """Summed over every patch and every kind of label; nothing here is random or depends on progress."""
        tokens_BNC = self.tower(batch.images_BYX3)
        logits_BNV = self.head(tokens_BNC)
        H, W = self.grid_HW
        given_BNL, place_N = batch.patch_labels_BNL, jnp.arange(H * W)
        labels = [given_BNL[..., i] for i in range(given_BNL.shape[-1])]
        labels += [jnp.broadcast_to(place, given_BNL.shape[:2]) for place in (place_N // W, place_N % W)]
        terms, start = [], 0
        for num, label_BN in zip(self.kinds, labels, strict=True):
            everywhere_BN = jnp.ones(label_BN.shape, bool)
            terms.append(loss.cross_entropy(logits_BNV[..., start : start + num], label_BN, everywhere_BN))
            start += num
        return jax.tree.map(lambda *parts: sum(parts), *terms)
