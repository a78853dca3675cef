"""Two-dimensional convolution of a token grid [B, H, W, C], padded as torch pads: the same number on both sides.

`strided SAME` pads 0 before and 1 after on even grids where torch's padding=1 pads both: equal shapes, other numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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
        if self.groups == kernel.shape[-1] == grid_BHWC.shape[-1]:
            out_BHWE = self._depthwise(grid_BHWC.astype(dtype), kernel.astype(dtype))
            return out_BHWE if self.bias is None else out_BHWE + self.bias[...]
        out_BHWE = jax.lax.conv_general_dilated(
            grid_BHWC.astype(dtype),
            kernel.astype(dtype),
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=_CHANNELS_LAST,
            feature_group_count=self.groups,
        )
        return out_BHWE if self.bias is None else out_BHWE + self.bias[...]

    def _depthwise(self, grid_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
        """One shifted product per tap. XLA's CPU backend has no fast depthwise convolution, least of all backwards."""
        rows, columns, _, _ = kernel.shape
        edge = (self.padding, self.padding)
        padded = jnp.pad(grid_BHWC, ((0, 0), edge, edge, (0, 0)))
        last_row, last_column = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
        taps = [
            padded[:, row : row + last_row : self.stride, column : column + last_column : self.stride]
            * kernel[row, column, 0]
            for row in range(rows)
            for column in range(columns)
        ]
        return sum(taps[1:], taps[0])


def halved(valid_BHW: jax.Array) -> jax.Array:
    """Which outputs of a convolution of stride 2 are real: those whose own 2 x 2 inputs hold a valid one.

    A valid input's output is valid. Inputs and outputs 0 where not valid, a padded grid gives what its valid corner gives
    alone: the convolution pads with 0 there, too.
    """
    B, H, W = valid_BHW.shape
    even_BHW = jnp.pad(valid_BHW, ((0, 0), (0, H % 2), (0, W % 2)))
    return even_BHW.reshape(B, -(-H // 2), 2, -(-W // 2), 2).any((2, 4))


def windows(num_in: int, *, stride: int) -> np.ndarray:
    """float32 [num_out, num_in], 1 where a convolution of 3 with padding 1 reads along one side."""
    centre = stride * np.arange(-(-num_in // stride))
    return (np.abs(centre[:, None] - np.arange(num_in)) <= 1).astype(np.float32)
