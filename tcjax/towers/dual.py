"""Two towers that see the same image, their features side by side: Prismatic's dinosiglip.

    tokens = [first(image) | second(image)]        along C, so N is one tower's

Both read one resized image: bytes, which each normalises for itself, or values that are normalised for the first already,
from which the second's follow, (x std_1 + mean_1 - mean_2) / std_2. Source: Karamcheti et al. 2024, "Prismatic VLMs"
(DinoSigLIPViTBackbone): DINOv2-L with registers first, then SigLIP so400m, each behind its second-to-last block and before
any norm, patches alone, resized naively to one size.
Departure: padding that a geometry adds ("letterbox", "pad") has the first tower's mean for both, Prismatic pads each apart.
Cost: both towers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.config import Pixels
from tcjax.towers.vit import Vit, VitConfig


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """towers: first and second, each with its own weights; their pixels may differ in mean and std, their grids may not."""

    towers: tuple[VitConfig, VitConfig]

    def __post_init__(self):
        if len(self.towers) != 2:
            raise ValueError(f"towers must be two, first and second, but there are {len(self.towers)}.")
        first, second = self.towers
        if replace(second.pixels, mean=first.pixels.mean, std=first.pixels.std) != first.pixels:
            raise ValueError(
                f"both towers read one resized image, so their pixels may differ in mean and std alone, but these are "
                f"{first.pixels} and {second.pixels}; give both one size and geometry (VitConfig.table_HW resizes positions)."
            )
        if first.grid_HW != second.grid_HW:
            raise ValueError(
                f"tokens are joined place by place, but the grids are {first.grid_HW} and {second.grid_HW}; the patches "
                f"must cut the image alike."
            )
        if bool(first.weights) != bool(second.weights):
            raise ValueError(
                f"weights={first.weights!r} and weights={second.weights!r}: one tower would be published and the other "
                f"random; give both, or none."
            )
        for tower in self.towers:
            if tower.keep_class or tower.levels or tower.probes:
                raise ValueError(
                    f"a dual tower hands over patches alone: keep_class={tower.keep_class}, levels={tower.levels}, "
                    f"probes={tower.probes} belong to one tower's tokens; leave them at False and ()."
                )

    keep_class = False
    levels = ()
    probes = ()

    @property
    def pixels(self) -> Pixels:
        """What the host makes of an image: the first tower's."""
        return self.towers[0].pixels

    @property
    def patch(self) -> int:
        """Side of the first tower's patches in pixels."""
        return self.towers[0].patch

    @property
    def width(self) -> int:
        """C, the sum of both: 1024 + 1152 = 2176 for dinosiglip."""
        return sum(tower.width for tower in self.towers)

    @property
    def grid_HW(self) -> tuple[int, int]:
        return self.towers[0].grid_HW

    @property
    def num_tokens(self) -> int:
        return self.towers[0].num_tokens

    @property
    def ragged(self) -> bool:
        """Whether every image has a grid of its own."""
        return self.towers[0].ragged

    def giving(self, **fields: Any) -> DualConfig:
        """The towers with what a compressor wants of them; ValueError for what two towers cannot give."""
        if set(fields) - {"shrunk_HW"}:
            raise ValueError(
                f"this compressor wants {fields} of its tower, and two towers have no layers, class token or attention in "
                f"common; choose one tower, or a compressor that reads the last tokens alone."
            )
        first, second = (tower.giving(**fields) for tower in self.towers)
        return replace(self, towers=(first, second))

    def build(self, rngs: nnx.Rngs) -> Dual:
        return Dual(self, rngs=rngs)


class Dual(nnx.Module):
    """cfg: the numbers it was built from."""

    def __init__(self, cfg: DualConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.towers: nnx.List[Vit] = nnx.List([tower.build(rngs) for tower in cfg.towers])

    def __call__(self, images_BYX3: jax.Array, grids_B2: jax.Array | None = None) -> jax.Array:
        """[B, N, C] of images, uint8 or normalised for the first tower."""
        first, second = self.towers
        if images_BYX3.dtype == jnp.uint8:
            return jnp.concatenate([first(images_BYX3, grids_B2), second(images_BYX3, grids_B2)], axis=-1)
        (mean_3, std_3), (to_mean_3, to_std_3) = (
            (np.array(tower.pixels.mean), np.array(tower.pixels.std)) for tower in self.cfg.towers
        )
        factor_3, offset_3 = (
            jnp.asarray(x, images_BYX3.dtype) for x in (std_3 / to_std_3, (mean_3 - to_mean_3) / to_std_3)
        )
        seen = first(images_BYX3, grids_B2), second(images_BYX3 * factor_3 + offset_3, grids_B2)
        return jnp.concatenate(seen, axis=-1)
