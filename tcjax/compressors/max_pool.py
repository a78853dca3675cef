"""Max pooling: the grid is cut into h x w bins, and the LLaVA MLP projects each bin's largest values, channel by channel.

    y_q = W_2 gelu(W_1 max(x_n : n in bin q))           or, "mlp, then pool", the maximum of what the MLP makes of x_n

Bins are avg_pool's, so torch's AdaptiveMaxPool2d: any h <= H. An invalid token never wins; a bin without any valid one
is an invalid output. A token's share of an output, in pictures, is the share of the channels it won.

Source: the baseline beside average pooling, as LLaVA-NeXT-Video offers it (`LlavaNextVideoPooler`, mode "max": whole
windows, before the projector). Only winners get a gradient. Cost: Q (C D + D^2) multiplications per image, with the MLP
first N (C D + D^2); no parameters beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, check_grid, handed_over, visible
from tcjax.compressors.queries import GridConfig
from tcjax.interop import lines
from tcjax.interop.names import Name
from tcjax.nn.mlp import projector
from tcjax.nn.pool import averaging_grid, bin_maxima

Order = Literal["pool, then mlp", "mlp, then pool"]


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """num_queries: h * w. shape: (h, w) of the pooled grid; None takes the square.

    depth: linear layers of the MLP; 0 projects nothing and needs a tower as wide as the LLM.
    order: whether the bins' maxima are projected or the projected tokens' maxima taken.
    """

    num_queries: int = 64
    depth: int = 2
    order: Order = "pool, then mlp"
    elastic = "pooling"

    def build(self, widths: Widths, rngs: nnx.Rngs) -> MaxPool:
        return MaxPool(self, widths, rngs=rngs)

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


class MaxPool(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.order not in get_args(Order):
            raise ValueError(f"order={config.order!r} is no order of max_pool; possible: {list(get_args(Order))}.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.pooled, self.mlp_first = config.out_grid(widths), config.order == "mlp, then pool"
        self.mlp = projector(widths.vision_C, widths.llm_D, config.depth, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        bins_QN = averaging_grid(self.widths.grid_HW, self.pooled) > 0
        valid_BQ = assign_BQN = None
        if context.valid_BN is not None:
            valid_BQ = (context.valid_BN[:, None] & bins_QN).any(-1)
        seen_BNC = visible(tokens_BNC, context)
        entering_BNC = self.mlp(seen_BNC) if self.mlp_first else seen_BNC
        if context.valid_BN is not None:
            entering_BNC = jnp.where(context.valid_BN[..., None], entering_BNC, -jnp.inf)
        most_BQC = bin_maxima(entering_BNC, self.widths.grid_HW, self.pooled)
        if valid_BQ is not None:
            most_BQC = jnp.where(valid_BQ[..., None], most_BQC, 0)
        if context.assign:
            assign_BQN = _wins(entering_BNC, most_BQC, bins_QN)
        return handed_over(most_BQC if self.mlp_first else self.mlp(most_BQC), valid_BQ, assign_BQN, context)


def _wins(tokens_BNC: jax.Array, most_BQC: jax.Array, bins_QN: np.ndarray) -> jax.Array:
    """How many channels each token of a bin won there, bin by bin: all at once would be B Q N C flags."""

    def of_bin(most_BC_and_bin_N):
        most_BC, bin_N = most_BC_and_bin_N
        return (tokens_BNC == most_BC[:, None]).sum(-1) * bin_N

    return jax.lax.map(of_bin, (most_BQC.swapaxes(0, 1), jnp.asarray(bins_QN))).swapaxes(0, 1)
