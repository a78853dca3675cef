"""LDP: project every token, then two MobileNetV3 blocks on the grid, the second with stride 2: a quarter of the tokens.

    z = W_2 gelu(W_1 x);   z <- z + block_1(z);   y = block_2(z)
    block(z) = LN(W_p se(u)),  u = hardswish(LN(conv(z)))          conv: depthwise 3 x 3, padding 1, stride 1 or 2
    se(u) = u * hardsigmoid(W_b relu(W_a mean(u)))                 mean over the whole grid

Source: Chu et al. 2023, "MobileVLM", LDPNetProjector (torchvision's InvertedResidual without expansion): LayerNorm over
the channels with eps 1e-5, convolutions without bias, D / 4 squeezed channels rounded to a multiple of 8, weights as
torch starts them.
Departures: any grid (published: squares); an odd side is rounded up, as torch does. Biases start at 0. With padding the
convolutions read 0 and the mean leaves out what is not valid, and an output is valid if any token of its own 2 x 2 is: a
padded image gives what its valid corner gives alone.
Cost: N (C D + 2 D^2) + 9 N D + Q D^2 + 9 Q D multiplications per image and the squeezed D^2.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    masked,
    one_image,
    visible,
)
from tcjax.compressors.queries import refuse_queries
from tcjax.interop.lines import conv, conv1x1, linear, norm
from tcjax.interop.names import Name
from tcjax.nn.conv import Conv, halved, windows
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm

_EPS = 1e-5
_STRIDES = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: None is ceil(H / 2) * ceil(W / 2); a number is a check, only that one is possible."""

    num_queries: int | None = None

    def outputs(self, widths: Widths) -> int:
        height, width = self.out_grid(widths)
        if self.num_queries not in (None, height * width):
            raise refuse_queries(self.num_queries or 0, widths, "one stride of 2", [height * width])
        return height * width

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        H, W = one_image(widths)
        return -(-H // 2), -(-W // 2)

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Ldp:
        return Ldp(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "pooled": list(self.out_grid(widths)),
            "strides": list(_STRIDES),
            "squeezed": squeezed(widths.llm_D),
            "depth": 2,
            "activation": "gelu",
            "norm_eps": _EPS,
        }

    def names(self, widths: Widths) -> list[Name]:
        """MobileVLM's mm_projector."""
        table = [*linear("mlp/linears/0", "model.mlp.1"), *linear("mlp/linears/1", "model.mlp.3")]
        for k in range(len(_STRIDES)):
            ours, theirs = f"blocks/{k}", f"model.mb_block.{k + 1}.block"
            table += conv(f"{ours}/near", f"{theirs}.0.0", bias=False)
            table += [*norm(f"{ours}/norm_near", f"{theirs}.0.1"), *norm(f"{ours}/norm", f"{theirs}.2.1")]
            table += [*conv1x1(f"{ours}/squeeze", f"{theirs}.1.fc1"), *conv1x1(f"{ours}/excite", f"{theirs}.1.fc2")]
            table += conv1x1(f"{ours}/mix", f"{theirs}.2.0", bias=False)
        return table


class Ldp(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs = widths, config.outputs(widths)
        C, D = widths.vision_C, widths.llm_D
        self.mlp = Mlp("CFD", (C, D, D), rngs=rngs)
        self.blocks = nnx.List([_Block(D, stride, rngs=rngs) for stride in _STRIDES])

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        B, (H, W) = len(tokens_BNC), self.widths.grid_HW
        projected_BND = self.mlp(visible(tokens_BNC, context))
        grid_BHWD = projected_BND.reshape(B, H, W, -1)
        valid_BHW = None if context.valid_BN is None else context.valid_BN.reshape(B, H, W)
        for block in self.blocks:
            grid_BHWD, valid_BHW = block(masked(grid_BHWD, valid_BHW), valid_BHW)
        tokens_BQD = grid_BHWD.reshape(B, self.num_outputs, -1)
        valid_BQ = None if valid_BHW is None else valid_BHW.reshape(B, -1)
        assign_BQN = None
        if context.assign:  # by the number of ways through the two windows; the mean over the grid is left out
            rows, columns = (windows(n, stride=2) @ windows(n, stride=1) for n in (H, W))
            assign_BQN = jnp.broadcast_to(np.kron(rows, columns), (B, self.num_outputs, H * W))
        return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)


class _Block(nnx.Module):
    """One inverted residual block; the residual is there if the stride is 1."""

    def __init__(self, D: int, stride: int, *, rngs: nnx.Rngs):
        F = squeezed(D)
        self.stride = stride
        self.near = Conv(
            "D", D, D, kernel=3, stride=stride, padding=1, groups=D, bias=False, init=torch_uniform, rngs=rngs
        )
        self.norm_near = LayerNorm("D", D, eps=_EPS)
        self.squeeze = dense("DF", D, F, init=torch_uniform, rngs=rngs)
        self.excite = dense("FD", F, D, init=torch_uniform, rngs=rngs)
        self.mix = dense("ED", D, D, bias=False, init=torch_uniform, rngs=rngs)
        self.norm = LayerNorm("D", D, eps=_EPS)

    def __call__(self, grid_BHWD: jax.Array, valid_BHW: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The next grid, and which of its places are valid. grid_BHWD is 0 where not valid."""
        out_valid_BHW = halved(valid_BHW) if valid_BHW is not None and self.stride == 2 else valid_BHW
        near_BHWD = masked(jax.nn.hard_swish(self.norm_near(self.near(grid_BHWD))), out_valid_BHW)
        sum_BD = near_BHWD.astype(jnp.float32).sum((1, 2))
        count_B = (
            jnp.asarray(near_BHWD.shape[1] * near_BHWD.shape[2]) if out_valid_BHW is None else _count(out_valid_BHW)
        )
        mean_BD = (sum_BD / count_B[..., None]).astype(near_BHWD.dtype)
        gate_BD = jax.nn.hard_sigmoid(self.excite(jax.nn.relu(self.squeeze(mean_BD))))
        mixed_BHWD = self.norm(self.mix(near_BHWD * gate_BD[:, None, None]))
        return grid_BHWD + mixed_BHWD if self.stride == 1 else mixed_BHWD, out_valid_BHW


def squeezed(D: int) -> int:
    """Channels between the two layers that weigh the channels: D / 4, rounded to a multiple of 8 as torchvision does."""
    near = max(8, (D // 4 + 4) // 8 * 8)
    return near + 8 if near < 0.9 * (D // 4) else near


def _count(valid_BHW: jax.Array) -> jax.Array:
    return jnp.maximum(valid_BHW.sum((1, 2)), 1)
