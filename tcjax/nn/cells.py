"""A token grid cut into h x w cells of equal size, so that each of Q = h * w queries can read a cell of its own.

Q = h * w cells row by row; inside a cell its M tokens in the order (dy, dx).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cells(tokens_BNC: jax.Array, grid_HW: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """[B, N, ...] -> [B, Q, M, ...]; `shape` is (h, w), and h and w divide the sides of the grid."""
    (H, W), (height, width) = grid_HW, shape
    assert H % height == 0 and W % width == 0, (grid_HW, shape)
    rest = tokens_BNC.shape[2:]
    split = tokens_BNC.reshape(-1, height, H // height, width, W // width, *rest)
    return split.swapaxes(2, 3).reshape(-1, height * width, (H // height) * (W // width), *rest)


def from_cells(weights_BQM: jax.Array, grid_HW: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """Weights of a cell's own tokens as weights of all tokens: [B, Q, M] -> [B, Q, N], 0 outside the cell."""
    (H, W), Q = grid_HW, shape[0] * shape[1]
    index_QM = cells(jnp.arange(H * W)[None], grid_HW, shape)[0]
    return jnp.zeros((len(weights_BQM), Q, H * W)).at[:, jnp.arange(Q)[:, None], index_QM].set(weights_BQM)
