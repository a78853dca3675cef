"""Average pooling: the grid is cut into h x w bins, and the LLaVA MLP projects each bin's mean.

    y_q = W_2 gelu(W_1 mean(x_n : n in bin q))          or, "mlp, then pool", the mean of what the MLP makes of each x_n

Bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1, torch's AdaptiveAvgPool2d: any h <= H, and bins
overlap where h does not divide H (24 -> 10 by one row). With padding the mean is over the bin's valid tokens; a bin
without any is an invalid output.

Source: Yao et al. 2024, "DeCo: Decoupling Token Compression from Semantic Abstraction", pools before LLaVA-1.5's
projector; Cho et al. 2025, "PerceptionLM", pools after it (matryoshka_pool does so at several sizes at once).
Departures: biases start at 0. depth=0 leaves the projection out, for chains of compressors.
Cost: Q (C D + D^2) multiplications per image, with the MLP first N (C D + D^2), and where bins overlap Q N C more, with
the MLP first Q N D; no parameters beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, check_grid, handed_over, masked, visible
from tcjax.compressors.queries import GridConfig
from tcjax.interop import lines
from tcjax.interop.names import Name
from tcjax.nn.mlp import projector
from tcjax.nn.pool import bin_means, bin_shares

Order = Literal["pool, then mlp", "mlp, then pool"]


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """num_queries: h * w. shape: (h, w) of the pooled grid; None takes the square.

    depth: linear layers of the MLP; 0 projects nothing and needs a tower as wide as the LLM.
    order: whether the bins' means are projected or the projected tokens averaged.
    """

    num_queries: int = 64
    depth: int = 2
    order: Order = "pool, then mlp"
    elastic = "pooling"

    def build(self, widths: Widths, rngs: nnx.Rngs) -> AvgPool:
        return AvgPool(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "pooled": list(self.out_grid(widths)),
            "order": self.order,
            "depth": self.depth,
            "activation": "gelu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """LLaVA's mm_projector."""
        return lines.mlp("mlp", "", self.depth)


class AvgPool(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.order not in get_args(Order):
            raise ValueError(f"order={config.order!r} is no order of avg_pool; possible: {list(get_args(Order))}.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.pooled, self.mlp_first = config.out_grid(widths), config.order == "mlp, then pool"
        self.mlp = projector(widths.vision_C, widths.llm_D, config.depth, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        grids, assign_BQN = (self.widths.grid_HW, self.pooled), None
        seen_BNC = visible(tokens_BNC, context)
        if self.mlp_first:
            projected_BND = masked(self.mlp(seen_BNC), context.valid_BN)  # the MLP of nothing is its bias
            tokens_BQD, valid_BQ = bin_means(projected_BND, context.valid_BN, *grids)
        else:
            mean_BQC, valid_BQ = bin_means(seen_BNC, context.valid_BN, *grids)
            tokens_BQD = self.mlp(mean_BQC)
        if context.assign:
            assign_BQN = bin_shares(len(tokens_BNC), *grids)
        return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)
