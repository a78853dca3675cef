"""Random tokens: Q of the N tokens, drawn once and for all per image, then the LLaVA MLP. A control, not a method.

    y = W_2 gelu(W_1 x_kept)         kept: the Q valid tokens with the smallest hash(seed, index, n), in raster order

index is the image's position in its source (`context.index_B`), so an image keeps the same tokens in every epoch, for
every method compared and in PyTorch; without one every image keeps those of index 0. The hash is integer arithmetic
that JAX and PyTorch do alike. A selection that does not beat this has selected nothing.

Source: the baseline of every pruning paper. With padding only valid tokens are drawn; with fewer than Q of them the
outputs left over are invalid. Biases start at 0. Cost: Q (C D + D^2) multiplications per image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    CompressorConfig,
    Context,
    Widths,
    check_grid,
    handed_over,
    visible,
)
from tcjax.interop import lines
from tcjax.interop.names import Name
from tcjax.nn.mlp import projector
from tcjax.nn.pick import hashed, in_order


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: tokens kept, any number up to N. seed: another one is another draw. depth: linear layers of the MLP."""

    num_queries: int = 64
    seed: int = 0
    depth: int = 2
    elastic = "pooling"

    def outputs(self, widths: Widths) -> int:
        if not 1 <= self.num_queries <= widths.num_tokens:
            raise ValueError(
                f"num_queries={self.num_queries}: must be from 1 up to the grid's {widths.num_tokens} tokens."
            )
        return self.num_queries

    def build(self, widths: Widths, rngs: nnx.Rngs) -> RandomTokens:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: must be from 0 to 2147483647.")
        return RandomTokens(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        return replace(self, num_queries=num_queries)

    def semantics(self, widths: Widths) -> dict:
        return {
            "seed": self.seed,
            "hash": "xorshift-multiply 0x45d9f3b",
            "depth": self.depth,
            "activation": "gelu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """LLaVA's mm_projector."""
        return lines.mlp("mlp", "", self.depth)


class RandomTokens(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs, self.seed = widths, config.outputs(widths), config.seed
        self.mlp = projector(widths.vision_C, widths.llm_D, config.depth, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        B, N, _ = tokens_BNC.shape
        seen_BNC, valid_BN = visible(tokens_BNC, context), context.valid_BN
        index_B = jnp.zeros(B, jnp.int32) if context.index_B is None else context.index_B
        draw_BN = hashed(self.seed, index_B[:, None], jnp.arange(N)) >> 1  # the top bit is for the invalid
        if valid_BN is not None:
            draw_BN = jnp.where(valid_BN, draw_BN, jnp.uint32(2**31))
        drawn_BQ = jnp.argsort(draw_BN, axis=1, stable=True)[:, : self.num_outputs]
        kept_BN = jnp.zeros((B, N), bool).at[jnp.arange(B)[:, None], drawn_BQ].set(True)
        if valid_BN is not None:
            kept_BN &= valid_BN
        where_BQ, valid_BQ = in_order(kept_BN, self.num_outputs)
        kept_BQC = jnp.take_along_axis(seen_BNC, where_BQ[..., None], axis=1)
        assign_BQN = where_BQ[..., None] == jnp.arange(N) if context.assign else None
        return handed_over(self.mlp(kept_BQC), None if valid_BN is None else valid_BQ, assign_BQN, context)
