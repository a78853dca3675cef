"""Matryoshka pooling (M3): the LLaVA MLP projects every token, then k x k blocks are averaged, at several k in one training.

    y_q = mean(W_2 gelu(W_1 x_n) : n in block q)         k = sqrt(N / scale), one block is the coarsest scale

One set of weights serves every scale. Training averages the loss over all of them; which scale a row of the batch gets
is `context.active_B`: the first `scale` of the Q outputs hold it and the others are invalid, so one compiled program
serves all. An active_B that is no scale gets the largest scale below it.

Source: Cai et al. 2024, "Matryoshka Multimodal Models", scales 1, 9, 36, 144, 576 on a 24 x 24 grid.
Departures: the original rounds k down, so that scale 100 silently gives 144 tokens; a scale that is no whole pooling is
refused here. With padding the mean is over the block's valid tokens; a block without any is an invalid output.
Cost: N (C D + D^2) multiplications per image: every scale is a mean of the same projected tokens.
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
    masked,
    one_image,
    visible,
)
from tcjax.compressors.queries import merge_factor
from tcjax.interop import lines
from tcjax.interop.names import Name
from tcjax.nn.mlp import projector
from tcjax.nn.pool import bin_means, bin_shares


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: the largest scale in use, a member of scales.

    scales: all that are trained; None takes num_queries, halves the grid's sides (or divides them by the smallest whole
        number there is) again and again, and ends with 1: the published 1, 9, 36, 144, 576 for 576.
    depth: linear layers of the MLP.
    """

    num_queries: int = 576
    scales: tuple[int, ...] | None = None
    depth: int = 2
    elastic = "pooling"

    def outputs(self, widths: Widths) -> int:
        for scale in self.trained():
            self.pooled(scale, widths)
        if self.num_queries not in self.trained():
            raise ValueError(f"num_queries={self.num_queries} is none of the scales; possible: {list(self.trained())}.")
        return self.num_queries

    def trained(self) -> tuple[int, ...]:
        """Every scale, the smallest first."""
        return tuple(sorted(set(_ladder(self.num_queries) if self.scales is None else self.scales)))

    def averaged_over(self) -> tuple[int, ...]:
        return tuple(scale for scale in self.trained() if scale <= self.num_queries)

    def pooled(self, scale: int, widths: Widths) -> tuple[int, int]:
        """(h, w) of a scale on this grid."""
        H, W = one_image(widths)
        if scale == 1:
            return 1, 1
        k = merge_factor(scale, widths, "a whole k x k pooling, as every scale must be (1 always is),")
        return H // k, W // k

    def build(self, widths: Widths, rngs: nnx.Rngs) -> MatryoshkaPool:
        return MatryoshkaPool(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        return replace(self, num_queries=num_queries, scales=self.trained())

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return self.pooled(self.outputs(widths), widths)

    def semantics(self, widths: Widths) -> dict:
        return {
            "pooled": list(self.out_grid(widths)),
            "scales": list(self.averaged_over()),
            "order": "mlp, then pool",
            "depth": self.depth,
            "activation": "gelu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """LLaVA's mm_projector."""
        return lines.mlp("mlp", "", self.depth)


class MatryoshkaPool(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.scales = config.averaged_over()
        self.pooled = tuple(config.pooled(scale, widths) for scale in self.scales)
        self.mlp = projector(widths.vision_C, widths.llm_D, config.depth, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        projected_BND = masked(self.mlp(visible(tokens_BNC, context)), context.valid_BN)
        if context.active_B is None:
            tokens_BQD, valid_BQ, assign_BQN = self._at(self.pooled[-1], projected_BND, context)
            return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)
        tokens_BQD = assign_BQN = None
        valid_BQ = jnp.zeros((len(tokens_BNC), self.num_outputs), bool)
        # Every scale is pooled, and overwrites the smaller ones in the rows that may have it.
        for scale, pooled in zip(self.scales, self.pooled, strict=True):
            fits_B11 = (context.active_B >= scale)[:, None, None]
            mean_BQD, some_BQ, share_BQN = self._at(pooled, projected_BND, context)
            if some_BQ is None:
                some_BQ = jnp.broadcast_to(jnp.arange(self.num_outputs) < scale, valid_BQ.shape)
            valid_BQ = jnp.where(fits_B11[..., 0], some_BQ, valid_BQ)
            tokens_BQD = jnp.where(fits_B11, mean_BQD, 0 if tokens_BQD is None else tokens_BQD)
            if share_BQN is not None:
                assign_BQN = jnp.where(fits_B11, share_BQN, 0 if assign_BQN is None else assign_BQN)
        assert tokens_BQD is not None
        return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)

    def _at(self, pooled: tuple[int, int], projected_BND: jax.Array, context: Context):
        """One scale in the first of the Q slots: tokens, which are valid (None without a mask), shares if asked."""
        grids, spare = (self.widths.grid_HW, pooled), self.num_outputs - pooled[0] * pooled[1]
        mean_BQD, valid_BQ = bin_means(projected_BND, context.valid_BN, *grids)
        mean_BQD = jnp.pad(mean_BQD, ((0, 0), (0, spare), (0, 0)))
        valid_BQ = None if valid_BQ is None else jnp.pad(valid_BQ, ((0, 0), (0, spare)))
        share_BQN = None
        if context.assign:
            share_BQN = jnp.pad(bin_shares(len(mean_BQD), *grids), ((0, 0), (0, spare), (0, 0)))
        return mean_BQD, valid_BQ, share_BQN


def _ladder(most: int) -> list[int]:
    """576 -> 144 -> 36 -> 9 -> 1: each the one before, divided by the smallest square that divides it."""
    scales = [most]
    while scales[-1] > 1:
        last = scales[-1]
        scales.append(next((last // s**2 for s in range(2, last) if last % s**2 == 0), 1))
    return scales
