"""Two-dimensional convolution of a token grid [B, H, W, C], padded as torch pads: the same number on both sides.

`strided SAME` pads 0 before and 1 after on even grids where torch's padding=1 pads both: equal shapes, other numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

_CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


class Conv(nnx.Module):
    """kernel [k, k, in / groups, out] and bias [out], float32. groups=in is a depthwise convolution.

    Args:
        axes: letters of the channels, "CE" or for a depthwise one "C".
    """

    def __init__(
        self,
        axes: str,
        num_in: int,
        num_out: int,
        *,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        init: initializers.Initializer,
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding, self.groups = stride, padding, groups
        shape = (kernel, kernel, num_in // groups, num_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32), axes="YX" + axes.rjust(2, "G"))
        self.bias = nnx.Param(jnp.zeros((num_out,)), axes=axes[-1]) if bias else None

    def __call__(self, grid_BHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        dtype = jnp.result_type(grid_BHWC, kernel)
        out_BHWE = jax.lax.conv_general_dilated(
            grid_BHWC.astype(dtype),
            kernel.astype(dtype),
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=_CHANNELS_LAST,
            feature_group_count=self.groups,
        )
        return out_BHWE if self.bias is None else out_BHWE + self.bias[...]
