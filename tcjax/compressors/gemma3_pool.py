"""Gemma 3's projector: the mean of every k x k block, an RMSNorm, one matrix.

    y_q = (1 + w) mean(x_n : n in block q) / rms(mean)  W           Q = N / k^2

Source: Kamath et al. 2025, "Gemma 3 Technical Report"; `Gemma3MultiModalProjector` in transformers. eps 1e-6 is SigLIP's;
no bias, no activation; W is stored as it is multiplied, [C, D].
Departures: transformers fills W with 0, a place for the checkpoint; here it starts as N(0, 1 / C). Rectangular grids.
With padding the mean is over the block's valid tokens; a block without any is an invalid output.
Cost: Q C D multiplications per image.
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
from tcjax.compressors.queries import merge_factor
from tcjax.interop.names import Name
from tcjax.nn.dense import dense
from tcjax.nn.norm import unit_scale
from tcjax.nn.pool import bin_means, bin_shares

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: N / k^2, where k divides both sides of the grid; Gemma 3 has 256 from 64 x 64."""

    num_queries: int = 256
    elastic = "pooling"

    def outputs(self, widths: Widths) -> int:
        merge_factor(self.num_queries, widths, "a whole k x k pooling")
        return self.num_queries

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Gemma3Pool:
        return Gemma3Pool(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        return replace(self, num_queries=num_queries)

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        (H, W), k = widths.grid_HW, merge_factor(self.num_queries, widths, "a whole k x k pooling")
        return H // k, W // k

    def semantics(self, widths: Widths) -> dict:
        return {"pooled": list(self.out_grid(widths)), "norm_eps": _EPS}

    def names(self, widths: Widths) -> list[Name]:
        """Gemma 3's multi_modal_projector."""
        return [
            Name("norm/scale", "mm_soft_emb_norm.weight"),
            Name("projection/kernel", "mm_input_projection_weight"),  # x @ W in torch too: not transposed
        ]


class Gemma3Pool(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.pooled = config.out_grid(widths)
        self.norm = _Norm("C", widths.vision_C)
        self.projection = dense("CD", widths.vision_C, widths.llm_D, bias=False, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        grids, assign_BQN = (self.widths.grid_HW, self.pooled), None
        mean_BQC, valid_BQ = bin_means(visible(tokens_BNC, context), context.valid_BN, *grids)
        if context.assign:
            assign_BQN = bin_shares(len(tokens_BNC), *grids)
        return handed_over(self.projection(self.norm(mean_BQC)), valid_BQ, assign_BQN, context)


class _Norm(nnx.Module):
    """Gemma's RMSNorm: the scale is kept as its distance from 1 and multiplied in before the cast."""

    def __init__(self, axis: str, width: int):
        self.scale = nnx.Param(jnp.zeros((width,)), axes=axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        unit = unit_scale(x.astype(jnp.float32), _EPS, False)
        return (unit * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
