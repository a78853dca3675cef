"""Staged pooling: the grid shrinks in several steps, with a ConvNeXt block between one and the next, then the LLaVA MLP.

    x <- mean of each bin                                   to the next stage's grid
    x <- x + s * W_2 gelu(W_1 LN(depthwise_conv(x)))        not after the last: what the next averaging sees is learned
    y = W_b gelu(W_a x)

Every stage is avg_pool's, so any smaller grid will do. By default the sides shrink by the same factor at every stage:
24 x 24 -> 17 x 17 -> 12 x 12 -> 8 x 8. `shapes` names the grids instead: ((16, 8), (8, 8), (8, 4)) on 16 x 16 is
"2 x 2 x 2 pooling in three stages". At the start s is 1e-6, so the whole is a pooling of poolings.

Source: ours, to give "multi-stage pooling" a definite form. The block is that of Liu et al. 2022, "A ConvNet for the
2020s" (depthwise 7 x 7, LayerNorm eps 1e-6, 4 times as wide inside, layer scale; kernels N(0, 0.02), biases 0), the
hierarchy too: its own stages shrink by strided convolution. No published checkpoint has this composition.
With padding every mean is over valid positions, convolutions read 0 at the others, and a position is valid if any that
it averages is. In pictures the share is that of the averaging alone.
Cost: per stage whose bins overlap h w h' w' C, per block h w (k^2 C + 8 C^2), at the end Q (C D + D^2) multiplications per image.
"""

from __future__ import annotations

import itertools
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
    shares,
    visible,
)
from tcjax.compressors.queries import pooled_shape
from tcjax.interop import lines
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.conv import Conv
from tcjax.nn.dense import dense, small_normal
from tcjax.nn.mlp import projector
from tcjax.nn.norm import LayerNorm
from tcjax.nn.pool import bin_means, bin_shares

_EPS = 1e-6
_LAYER_SCALE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: h * w of the last stage, a square unless shapes says otherwise.

    stages: how often it is pooled; there is a block less.
    shapes: (h, w) after every stage, the last with num_queries tokens; None shrinks both sides evenly in `stages` steps.
    kernel: side of the depthwise convolutions. expand: width of a block inside, in C. depth: linear layers of the MLP.
    """

    num_queries: int = 64
    stages: int = 3
    shapes: tuple[tuple[int, int], ...] | None = None
    kernel: int = 7
    expand: int = 4
    depth: int = 2
    elastic = "pooling"

    def outputs(self, widths: Widths) -> int:
        self.grids(widths)
        return self.num_queries

    def grids(self, widths: Widths) -> list[tuple[int, int]]:
        """(h, w) after every stage on this grid."""
        H, W = one_image(widths)
        if self.shapes is None:
            if self.stages < 1:
                raise ValueError(f"stages={self.stages}: must be at least 1.")
            height, width = pooled_shape(self.num_queries, None, widths)
            parts = [stage / self.stages for stage in range(1, self.stages + 1)]
            return [(round(H * (height / H) ** part), round(W * (width / W) ** part)) for part in parts]
        grids = [(H, W), *(tuple(shape) for shape in self.shapes)]
        for before, after in itertools.pairwise(grids):
            if not (1 <= after[0] <= before[0] and 1 <= after[1] <= before[1]):
                raise ValueError(f"shapes={self.shapes}: {after} is no pooling of {before}; no side may grow.")
        if len(grids) == 1:
            raise ValueError("shapes=(): must name at least 1 stage; None shrinks the grid evenly.")
        pooled_shape(self.num_queries, grids[-1], widths)
        return grids[1:]

    def build(self, widths: Widths, rngs: nnx.Rngs) -> StagedPool:
        return StagedPool(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        stages = self.stages if self.shapes is None else len(self.shapes)
        return replace(self, num_queries=num_queries, stages=stages, shapes=None)

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return self.grids(widths)[-1]

    def semantics(self, widths: Widths) -> dict:
        return {
            "stages": [list(grid) for grid in self.grids(widths)],
            "kernel": self.kernel,
            "feed_forward": self.expand * widths.vision_C,
            "norm_eps": _EPS,
            "depth": self.depth,
            "activation": "gelu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """ConvNeXt's layers and LLaVA's mm_projector."""
        table = lines.mlp("mlp", "mm_projector.", self.depth)
        for i in range(len(self.grids(widths)) - 1):
            table += lines.conv(f"blocks/{i}/conv", f"blocks.{i}.dwconv")
            table += lines.norm(f"blocks/{i}/norm", f"blocks.{i}.layernorm")
            table += lines.linear(f"blocks/{i}/ff_in", f"blocks.{i}.pwconv1")
            table += lines.linear(f"blocks/{i}/ff_out", f"blocks.{i}.pwconv2")
            table += [Name(f"blocks/{i}/layer_scale", f"blocks.{i}.layer_scale_parameter")]
        return table


class StagedPool(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.kernel < 1 or config.kernel % 2 == 0 or config.expand < 1:
            raise ValueError(
                f"kernel={config.kernel}, expand={config.expand}: the kernel must be odd, the width at least 1."
            )
        self.widths, self.num_outputs, C = widths, config.outputs(widths), widths.vision_C
        self.grids = tuple(config.grids(widths))
        self.blocks = nnx.List([_Block(config, C, rngs=rngs) for _ in self.grids[1:]])
        self.mlp = projector(C, widths.llm_D, config.depth, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        x_BMC, valid_BM, assign_BMN = visible(tokens_BNC, context), context.valid_BN, None
        grids = (self.widths.grid_HW, *self.grids)
        for i, (before, after) in enumerate(itertools.pairwise(grids)):
            if context.assign:
                share_BQM = shares(bin_shares(len(x_BMC), before, after), valid_BM)
                through = assign_BMN is not None
                assign_BMN = jnp.einsum("BQM,BMN->BQN", share_BQM, assign_BMN) if through else share_BQM
            x_BMC, valid_BM = bin_means(x_BMC, valid_BM, before, after)
            if i < len(self.blocks):
                x_BMC = masked(self.blocks[i](x_BMC, after), valid_BM)
        return handed_over(self.mlp(x_BMC), valid_BM, assign_BMN, context)


class _Block(nnx.Module):
    """ConvNeXt's: neighbours mix channel by channel, then channels position by position, as a residual."""

    def __init__(self, config: Config, C: int, *, rngs: nnx.Rngs):
        F, k = config.expand * C, config.kernel
        self.conv = Conv("C", C, C, kernel=k, padding=k // 2, groups=C, init=small_normal, rngs=rngs)
        self.norm = LayerNorm("C", C, eps=_EPS)
        self.ff_in = dense("CF", C, F, init=small_normal, rngs=rngs)
        self.ff_out = dense("FC", F, C, init=small_normal, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full((C,), _LAYER_SCALE, jnp.float32), axes="C")

    def __call__(self, tokens_BNC: jax.Array, grid_HW: tuple[int, int]) -> jax.Array:
        B, N, C = tokens_BNC.shape
        near_BNC = self.conv(tokens_BNC.reshape(B, *grid_HW, C)).reshape(B, N, C)
        hidden_BNF = ACTIVATIONS["gelu"](self.ff_in(self.norm(near_BNC)))
        return tokens_BNC + self.layer_scale[...] * self.ff_out(hidden_BNF)
