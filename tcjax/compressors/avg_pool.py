"""Average pooling: the grid is cut into h x w bins, and the LLaVA MLP projects each bin's mean.

    y_q = W_2 gelu(W_1 mean(x_n : n in bin q))

Bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1, torch's AdaptiveAvgPool2d: any h <= H, and bins
overlap where h does not divide H (24 -> 10 by one row). With padding the mean is over the bin's valid tokens; a bin
without any is an invalid output.

Source: Yao et al. 2024, "DeCo: Decoupling Token Compression from Semantic Abstraction", with LLaVA-1.5's projector.
Pooling comes before the MLP, as in DeCo; after it (PerceptionLM) the MLP costs N/Q times more. Biases start at 0.
Cost: Q N C + Q (C D + D^2) multiplications per image; no parameters beyond the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
    Widths,
    check_grid,
    masked,
    refuse_queries,
    shares,
    visible,
)
from tcjax.nn.mlp import Mlp
from tcjax.nn.pool import averaging_matrix


@dataclass(frozen=True, kw_only=True)
class Config:
    """num_queries: h * w. shape: (h, w) of the pooled grid; None takes the square."""

    num_queries: int = 64
    shape: tuple[int, int] | None = None

    def outputs(self, widths: Widths) -> int:
        height, width = self.pooled(widths)
        return height * width

    def pooled(self, widths: Widths) -> tuple[int, int]:
        """(h, w) on this grid."""
        H, W = widths.grid_HW
        if self.shape is None:
            side = math.isqrt(max(self.num_queries, 0))
            if side * side != self.num_queries or not 1 <= side <= min(H, W):
                squares = [side**2 for side in range(1, min(H, W) + 1)]
                raise refuse_queries(self.num_queries, widths, "a square pooling (shape=(h, w) gives others)", squares)
            return side, side
        height, width = self.shape
        if not (1 <= height <= H and 1 <= width <= W):
            raise ValueError(f"shape={self.shape} is not a pooling of a {H}x{W} grid; possible: (1, 1) to ({H}, {W}).")
        if height * width != self.num_queries:
            possible = [(h, self.num_queries // h) for h in range(1, H + 1) if self.num_queries % h == 0]
            possible = [(h, w) for h, w in possible if 1 <= w <= W]
            raise ValueError(
                f"shape={self.shape} has {height * width} tokens, num_queries={self.num_queries}: say the same number "
                f"twice; possible shapes for {self.num_queries} on a {H}x{W} grid: {possible}."
            )
        return height, width

    def build(self, widths: Widths, rngs: nnx.Rngs) -> AvgPool:
        return AvgPool(self, widths, rngs=rngs)


class AvgPool(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.pooled = config.pooled(widths)
        self.mlp = Mlp("CFD", (widths.vision_C, widths.llm_D, widths.llm_D), rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        (H, W), (height, width) = self.widths.grid_HW, self.pooled
        pool_QN = np.kron(averaging_matrix(H, height), averaging_matrix(W, width))
        # float32: 1/9 in bfloat16 is off by 1/500, and then the nine shares of a bin no longer sum to 1.
        wide_BNC = visible(tokens_BNC, context).astype(jnp.float32)
        mean_BQC = jnp.einsum("QN,BNC->BQC", pool_QN, wide_BNC)
        valid_BQ = None
        if context.valid_BN is not None:
            valid_BN = context.valid_BN.astype(jnp.float32)
            mass_BQ = jnp.einsum("QN,BN->BQ", pool_QN, valid_BN)
            valid_BQ = mass_BQ > 0
            mean_BQC = mean_BQC / jnp.where(valid_BQ, mass_BQ, 1)[..., None]
        assign_BQN = None
        if context.assign:
            assign_BQN = shares(jnp.broadcast_to(pool_QN, (len(tokens_BNC), *pool_QN.shape)), context.valid_BN)
        return Compressed(masked(self.mlp(mean_BQC.astype(tokens_BNC.dtype)), valid_BQ), valid_BQ, assign_BQN)
