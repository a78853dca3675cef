"""DeepSeek-OCR's compressor: two convolutions of stride 2, so that 4 x 4 tokens become one, then a projection.

    y = W_out conv_2(conv_1(x))          each 3 x 3, stride 2, padding 1, no bias, C -> 2 C -> 4 C; nothing between them

Source: Wei et al. 2025, "DeepSeek-OCR: Contexts Optical Compression": net_2 and net_3 behind SAM's neck, 256 -> 512 ->
1024, weights as torch starts them. `neck=256` has that neck, too: W x without bias, LayerNorm over the channels (eps
1e-6), a 3 x 3 convolution without bias, LayerNorm.
Departures: W_out (4 C -> D, with bias) is ours; there the map goes on into a CLIP and both into one projection of 2048.
With padding the convolutions read 0 for what is not valid, and an output is valid if any token of its own 4 x 4 is: a
padded image gives what its valid corner gives alone. Sides that 4 does not divide are rounded up, as torch does.
Cost: 9 N C^2 / 2 + 9 N C^2 / 2 + 4 Q C D multiplications per image, Q = N / 16; 90 C^2 parameters without W_out.
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
from tcjax.nn.norm import LayerNorm

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: None is ceil(H / 4) * ceil(W / 4); a number is a check, only that one is possible.

    neck: channels of a neck before the convolutions, whose C it then is (DeepSeek-OCR: 256); 0 has none.
    """

    num_queries: int | None = None
    neck: int = 0

    def outputs(self, widths: Widths) -> int:
        height, width = self.out_grid(widths)
        if self.num_queries not in (None, height * width):
            raise refuse_queries(self.num_queries or 0, widths, "two strides of 2", [height * width])
        return height * width

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        H, W = one_image(widths)
        return -(-H // 4), -(-W // 4)

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Conv16:
        return Conv16(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        facts = {"pooled": list(self.out_grid(widths)), "kernel": 3, "strides": [2, 2], "neck": self.neck}
        return facts | ({"norm_eps": _EPS} if self.neck else {})

    def names(self, widths: Widths) -> list[Name]:
        """DeepSeek-OCR's sam_model; out_proj is ours."""
        table = [*conv("first", "net_2", bias=False), *conv("second", "net_3", bias=False)]
        table += linear("out_proj", "out_proj")
        if self.neck:
            table += [*conv1x1("neck/narrow", "neck.0", bias=False), *norm("neck/norm_narrow", "neck.1")]
            table += [*conv("neck/near", "neck.2", bias=False), *norm("neck/norm_near", "neck.3")]
        return table


class Conv16(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.neck < 0:
            raise ValueError(f"neck={config.neck}: must be the neck's number of channels, or 0 for none.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        C = config.neck or widths.vision_C
        self.neck = _Neck(widths.vision_C, C, rngs=rngs) if config.neck else None
        self.first = _conv("CE", C, 2 * C, stride=2, rngs=rngs)
        self.second = _conv("EI", 2 * C, 4 * C, stride=2, rngs=rngs)
        self.out_proj = dense("ID", 4 * C, widths.llm_D, init=torch_uniform, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        B, (H, W) = len(tokens_BNC), self.widths.grid_HW
        grid_BHWC = visible(tokens_BNC, context).reshape(B, H, W, -1)
        valid_BHW = None if context.valid_BN is None else context.valid_BN.reshape(B, H, W)
        if self.neck is not None:
            grid_BHWC = masked(self.neck(grid_BHWC, valid_BHW), valid_BHW)
        for layer in (self.first, self.second):
            valid_BHW = None if valid_BHW is None else halved(valid_BHW)
            grid_BHWC = masked(layer(grid_BHWC), valid_BHW)
        tokens_BQD = self.out_proj(grid_BHWC.reshape(B, self.num_outputs, -1))
        valid_BQ = None if valid_BHW is None else valid_BHW.reshape(B, -1)
        assign_BQN = None
        if context.assign:  # by the number of ways through the two windows
            rows, columns = (windows(-(-n // 2), stride=2) @ windows(n, stride=2) for n in (H, W))
            assign_BQN = jnp.broadcast_to(np.kron(rows, columns), (B, self.num_outputs, H * W))
        return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)


class _Neck(nnx.Module):
    """SAM's neck: to fewer channels, then a look at the neighbours, a norm behind each."""

    def __init__(self, wide: int, narrow: int, *, rngs: nnx.Rngs):
        self.narrow = dense("CE", wide, narrow, bias=False, init=torch_uniform, rngs=rngs)
        self.norm_narrow = LayerNorm("E", narrow, eps=_EPS)
        self.near = _conv("EI", narrow, narrow, stride=1, rngs=rngs)
        self.norm_near = LayerNorm("I", narrow, eps=_EPS)

    def __call__(self, grid_BHWC: jax.Array, valid_BHW: jax.Array | None) -> jax.Array:
        narrow_BHWE = masked(self.norm_narrow(self.narrow(grid_BHWC)), valid_BHW)
        return self.norm_near(self.near(narrow_BHWE))


def _conv(axes: str, num_in: int, num_out: int, *, stride: int, rngs: nnx.Rngs) -> Conv:
    return Conv(axes, num_in, num_out, kernel=3, stride=stride, padding=1, bias=False, init=torch_uniform, rngs=rngs)
