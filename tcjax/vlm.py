"""The whole model on one screen: tower -> compressor -> splice -> LLM.

The splice is static: a row has R images, R a number of the batch's shapes, and the running count of its image positions
indexes its R * Q visual tokens. A row with fewer images carries blank ones that no position refers to.
A visual token that the compressor marks invalid is hidden from attention and takes no position.
A compressor may be told the question (`Batch.instruction_BT`, embedded by the LLM's own table, without positions), the
tower's earlier layers, and as prior scores what the tower itself looks at (the first score among `VitConfig.probes`); what
it does at random it does in training only, by a key per sample and step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax import loss
from tcjax.batch import Batch
from tcjax.compressors.base import Compressed, Compressor, CompressorConfig, Context, Widths
from tcjax.llms.decoder import Decoder, LlmConfig
from tcjax.towers import naflex
from tcjax.towers.blocks import SCORES
from tcjax.towers.dual import Dual, DualConfig
from tcjax.towers.vit import Vit, VitConfig


@dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """tower and llm are frozen unless `TrainConfig.trainable` names them; compressor is what a study varies.

    seen: the tower as it is built, with what the compressor wants of it (`CompressorConfig.of_tower`).
    """

    tower: VitConfig | DualConfig
    compressor: object
    llm: LlmConfig

    @cached_property
    def widths(self) -> Widths:
        return Widths(
            grid_HW=self.seen.grid_HW,
            vision_C=self.seen.width,
            llm_D=self.llm.width,
            text_D=self.llm.width,
            levels=len(self.seen.levels),
            extra=int(self.seen.keep_class),
            ragged=self.seen.ragged,
        )

    @cached_property
    def seen(self) -> VitConfig | DualConfig:
        fields = self._compressor.of_tower()
        return self.tower.giving(**fields) if fields else self.tower

    @property
    def one_tower(self) -> VitConfig:
        """`seen` where it is one tower; ValueError for two side by side."""
        if isinstance(self.seen, DualConfig):
            raise ValueError("the tower is two towers side by side (DualConfig), and this holds one alone.")
        return self.seen

    @property
    def _compressor(self) -> CompressorConfig:
        return self.compressor  # pyright: ignore[reportReturnType]

    @property
    def num_queries(self) -> int:
        """Q, the visual tokens the LLM sees; ValueError if the compressor cannot give them on this grid or from this tower."""
        if "prior" in self._compressor.needs and not set(self.seen.probes) & set(SCORES):
            raise ValueError(
                f"{self._compressor.family} starts from scores of the tokens, and this tower tells none: "
                f"probes={self.seen.probes}; name one of {SCORES} in VitConfig.probes."
            )
        return self._compressor.outputs(self.widths)

    @property
    def reads_text(self) -> bool:
        """Whether the compressor is conditioned on the question."""
        return "text" in self._compressor.needs

    @property
    def averaged_over(self) -> tuple[int, ...]:
        """Numbers of active visual tokens whose losses a training step averages; () is all of them at once."""
        return self._compressor.averaged_over()

    @property
    def labelled_patch(self) -> None:
        """No dense labels are read from the data."""
        return None

    def build(self, rngs: nnx.Rngs) -> Vlm:
        return Vlm(self, rngs=rngs)


class Vlm(nnx.Module):
    """Parts by the names that `trainable`, `weights` and checkpoints use: tower, compressor, llm."""

    def __init__(self, config: VlmConfig, *, rngs: nnx.Rngs):
        config.num_queries  # noqa: B018  an impossible Q is said before anything is built
        compressor: CompressorConfig = config.compressor  # pyright: ignore[reportAssignmentType]
        self.averaged_over = config.averaged_over
        self.tower: Vit | Dual = config.seen.build(rngs)
        self.compressor: Compressor = compressor.build(config.widths, rngs)
        self.llm: Decoder = config.llm.build(rngs)

    def see(self, batch: Batch) -> jax.Array:
        """What the tower hands over, from pixels or from the cache: tokens_BNC, behind them its earlier layers and probes."""
        return self.tower(batch.images_BYX3, batch.grids_B2) if batch.features_BNC is None else batch.features_BNC

    def compress(self, batch: Batch, context: Context = Context()) -> Compressed:
        cfg, seen_BNC = self.tower.cfg, self.see(batch)
        C, behind = cfg.width, (1 + len(cfg.levels)) * cfg.width
        context = context._replace(index_B=batch.index_B)
        if cfg.levels:
            context = context._replace(levels_BNE=seen_BNC[..., C:behind])
        for probe in cfg.probes:
            if probe in SCORES and context.prior_BN is None:
                context = context._replace(prior_BN=seen_BNC[..., behind])
            behind += 1 if probe in SCORES else C
        if cfg.ragged:
            grids_B2 = naflex.check_grids(batch.grids_B2, len(seen_BNC))
            context = context._replace(valid_BN=naflex.valid(grids_B2, seen_BNC.shape[1]))
        if batch.instruction_BT is not None:
            ids_BT = batch.instruction_BT
            text_BTD = self.llm.embed(jnp.maximum(ids_BT, 0))
            context = context._replace(text_BTD=text_BTD, text_valid_BT=ids_BT >= 0)
        return self.compressor(seen_BNC[..., :C], context)

    def embed(self, batch: Batch, context: Context = Context()) -> tuple[jax.Array, jax.Array]:
        """seq_BSD with the visual tokens in their places, and valid_BS."""
        compressed = self.compress(batch, context)
        text_BSD = self.llm.embed(batch.tokens_BS)
        return splice(text_BSD, compressed, batch.is_image_BS, batch.valid_BS)

    def loss_terms(self, batch: Batch, key: jax.Array | None = None, progress: jax.Array | None = None) -> loss.Terms:
        """Next-token cross-entropy over the supervised tokens, as a sum and a count.

        Args:
            key: of this training step; every image draws from it by its own index, so neither the number of devices
                nor of microbatches matters. None: nothing is random.
            progress: share of the training that is over, float32.
        """
        keys_B = None
        if key is not None:
            index_B = jnp.arange(_num_images(batch)) if batch.index_B is None else batch.index_B
            keys_B = jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)
        context = Context(keys_B=keys_B, progress=progress)
        if not self.averaged_over:
            return self._terms(batch, context)
        batch = batch._replace(features_BNC=self.see(batch))
        each = []
        for active in self.averaged_over:
            active_B = jnp.full(_num_images(batch), active)
            each.append(self._terms(batch, context._replace(active_B=active_B)))
        return jax.tree.map(lambda *terms: sum(terms) / len(each), *each)

    def _terms(self, batch: Batch, context: Context) -> loss.Terms:
        seq_BSD, valid_BS = self.embed(batch, context)
        hidden_BSD = self.llm(seq_BSD, valid_BS, batch.segment_BS)
        return loss.next_token(hidden_BSD, self.llm.table_VD, batch.tokens_BS, batch.supervised_BS)


def splice(
    text_BSD: jax.Array, compressed: Compressed, is_image_BS: jax.Array, valid_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put a row's visual token q at its q-th image position; return the sequence and which positions are valid.

    Args:
        compressed: R images per row, row after row; the row's visual tokens are theirs one after another.
    """
    B, D = len(text_BSD), compressed.tokens_BQD.shape[-1]
    if len(compressed.tokens_BQD) % B:
        raise ValueError(f"{len(compressed.tokens_BQD)} images do not belong to {B} rows of equally many images each.")
    tokens_BQD = compressed.tokens_BQD.reshape(B, -1, D)  # Q is R * Q from here on
    rank_BS = jnp.clip(jnp.cumsum(is_image_BS, axis=1) - 1, 0, tokens_BQD.shape[1] - 1)
    visual_BSD = jnp.take_along_axis(tokens_BQD, rank_BS[..., None], axis=1)
    seq_BSD = jnp.where(is_image_BS[..., None], visual_BSD.astype(text_BSD.dtype), text_BSD)
    if compressed.valid_BQ is not None:
        slot_BS = jnp.take_along_axis(compressed.valid_BQ.reshape(B, -1), rank_BS, axis=1)
        valid_BS = valid_BS & jnp.where(is_image_BS, slot_BS, True)
    return seq_BSD, valid_BS


def _num_images(batch: Batch) -> int:
    """Rows * R."""
    return len(batch.images_BYX3 if batch.features_BNC is None else batch.features_BNC)
