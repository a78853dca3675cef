"""LDPv2: project every token, average the grid to h x w bins, then let neighbours meet in one depthwise convolution.

    z = bins(W_2 gelu(W_1 x));   y = z + conv(z)          conv: depthwise 3 x 3, padding 1, with bias

Source: Chu et al. 2024, "MobileVLM V2: Faster and Stronger Baseline for Vision Language Model", LDPNetV2Projector: 144
tokens, weights as torch starts them. Bins are torch's AdaptiveAvgPool2d; no weight depends on their number.
Departures: any grid and any h x w (published: a square of 12). Biases start at 0. With padding a bin's mean is over its
valid tokens, the convolution reads 0 where a bin has none, and such a bin is an invalid output.
Cost: N (C D + D^2) + 9 Q D multiplications per image, Q N D more where bins overlap: the projection comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, check_grid, handed_over, masked, visible
from tcjax.compressors.queries import GridConfig
from tcjax.interop.lines import conv, mlp
from tcjax.interop.names import Name
from tcjax.nn.conv import Conv
from tcjax.nn.dense import torch_uniform
from tcjax.nn.mlp import Mlp
from tcjax.nn.pool import bin_means, bin_shares


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """num_queries: h * w. shape: (h, w) of the pooled grid; None takes the square."""

    num_queries: int = 144
    elastic = "pooling"

    def build(self, widths: Widths, rngs: nnx.Rngs) -> LdpV2:
        return LdpV2(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "pooled": list(self.out_grid(widths)),
            "order": "mlp, pool, convolution",
            "depth": 2,
            "activation": "gelu",
            "kernel": 3,
        }

    def names(self, widths: Widths) -> list[Name]:
        """MobileVLM V2's mm_projector."""
        return [*mlp("mlp", "mlp.mlp.", 2), *conv("peg", "peg.peg.0")]


class LdpV2(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs, self.pooled = widths, config.outputs(widths), config.out_grid(widths)
        C, D = widths.vision_C, widths.llm_D
        self.mlp = Mlp("CFD", (C, D, D), rngs=rngs)
        self.peg = Conv("D", D, D, kernel=3, padding=1, groups=D, init=torch_uniform, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        grids = self.widths.grid_HW, self.pooled
        projected_BND = masked(self.mlp(visible(tokens_BNC, context)), context.valid_BN)
        mean_BQD, valid_BQ = bin_means(projected_BND, context.valid_BN, *grids)
        near_BHWD = self.peg(mean_BQD.reshape(-1, *self.pooled, mean_BQD.shape[-1]))
        assign_BQN = bin_shares(len(tokens_BNC), *grids) if context.assign else None
        return handed_over(mean_BQD + near_BHWD.reshape(mean_BQD.shape), valid_BQ, assign_BQN, context)
