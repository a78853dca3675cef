"""The whole model on one screen: tower -> compressor -> splice -> LLM.

The splice is static: row b has exactly Q image positions, and their running count indexes the Q visual tokens.
A visual token that the compressor marks invalid is hidden from attention and takes no position.
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
from tcjax.towers.vit import Vit, VitConfig


@dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """tower and llm are frozen unless `TrainConfig.trainable` names them; compressor is what a study varies."""

    tower: VitConfig
    compressor: object
    llm: LlmConfig

    @cached_property
    def widths(self) -> Widths:
        return Widths(
            grid_HW=self.tower.grid_HW, vision_C=self.tower.width, llm_D=self.llm.width, text_D=self.llm.width
        )

    @property
    def num_queries(self) -> int:
        """Q, the visual tokens the LLM sees; ValueError if the compressor cannot give them on this grid."""
        config: CompressorConfig = self.compressor  # pyright: ignore[reportAssignmentType]
        return config.outputs(self.widths)

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
        self.tower: Vit = config.tower.build(rngs)
        self.compressor: Compressor = compressor.build(config.widths, rngs)
        self.llm: Decoder = config.llm.build(rngs)

    def see(self, batch: Batch) -> jax.Array:
        """The tower's tokens_BNC, from pixels or from the cache of features."""
        return self.tower(batch.images_BYX3) if batch.features_BNC is None else batch.features_BNC

    def compress(self, batch: Batch, context: Context = Context()) -> Compressed:
        return self.compressor(self.see(batch), context)

    def embed(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """seq_BSD with the visual tokens in their places, and valid_BS."""
        compressed = self.compress(batch)
        text_BSD = self.llm.embed(batch.tokens_BS)
        return splice(text_BSD, compressed, batch.is_image_BS, batch.valid_BS)

    def loss_terms(self, batch: Batch) -> loss.Terms:
        """Next-token cross-entropy over the supervised tokens, as a sum and a count."""
        seq_BSD, valid_BS = self.embed(batch)
        logits_BSV = self.llm.logits(self.llm(seq_BSD, valid_BS, batch.segment_BS))
        return loss.next_token(logits_BSV, batch.tokens_BS, batch.supervised_BS)


def splice(
    text_BSD: jax.Array, compressed: Compressed, is_image_BS: jax.Array, valid_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put visual token q at the q-th image position of its row; return the sequence and which positions are valid."""
    Q = compressed.tokens_BQD.shape[1]
    rank_BS = jnp.clip(jnp.cumsum(is_image_BS, axis=1) - 1, 0, Q - 1)
    visual_BSD = jnp.take_along_axis(compressed.tokens_BQD, rank_BS[..., None], axis=1)
    seq_BSD = jnp.where(is_image_BS[..., None], visual_BSD.astype(text_BSD.dtype), text_BSD)
    if compressed.valid_BQ is not None:
        slot_BS = jnp.take_along_axis(compressed.valid_BQ, rank_BS, axis=1)
        valid_BS = valid_BS & jnp.where(is_image_BS, slot_BS, True)
    return seq_BSD, valid_BS
