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

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    CompressorConfig,
    Context,
    Widths,
    check_grid,
    handed_over,
    pooled_shape,
    visible,
)
from tcjax.interop.lines import linear
from tcjax.interop.names import Name
from tcjax.nn.mlp import Mlp
from tcjax.nn.pool import averaging_matrix


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: h * w. shape: (h, w) of the pooled grid; None takes the square."""

    num_queries: int = 64
    shape: tuple[int, int] | None = None
    elastic = "pooling"

    def outputs(self, widths: Widths) -> int:
        height, width = self.pooled(widths)
        return height * width

    def pooled(self, widths: Widths) -> tuple[int, int]:
        """(h, w) on this grid."""
        return pooled_shape(self.num_queries, self.shape, widths)

    def build(self, widths: Widths, rngs: nnx.Rngs) -> AvgPool:
        return AvgPool(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        return replace(self, num_queries=num_queries, shape=None)

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return self.pooled(widths)

    def semantics(self, widths: Widths) -> dict:
        return {"pooled": list(self.pooled(widths)), "order": "pool, then mlp", "depth": 2, "activation": "gelu"}

    def names(self, widths: Widths) -> list[Name]:
        """LLaVA's mm_projector."""
        return [*linear("mlp/linears/0", "0"), *linear("mlp/linears/1", "2")]


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
        valid_BQ = assign_BQN = None
        if context.valid_BN is not None:
            valid_BN = context.valid_BN.astype(jnp.float32)
            mass_BQ = jnp.einsum("QN,BN->BQ", pool_QN, valid_BN)
            valid_BQ = mass_BQ > 0
            mean_BQC = mean_BQC / jnp.where(valid_BQ, mass_BQ, 1)[..., None]
        if context.assign:
            assign_BQN = jnp.broadcast_to(pool_QN, (len(tokens_BNC), *pool_QN.shape))
        return handed_over(self.mlp(mean_BQC.astype(tokens_BNC.dtype)), valid_BQ, assign_BQN, context)
