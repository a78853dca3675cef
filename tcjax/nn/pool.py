"""Adaptive pooling as two small averaging matrices, exactly torch's AdaptiveAvgPool2d, overlapping bins included.

bin i of `num_out` averages inputs floor(i n / o) ... ceil((i + 1) n / o) - 1
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]


def averaging_matrix(num_in: int, num_out: int) -> np.ndarray:
    """float32 [num_out, num_in], rows summing to 1. 24 -> 10 overlaps by one, as torch's does."""
    matrix = np.zeros((num_out, num_in), np.float32)
    for i in range(num_out):
        first, past = i * num_in // num_out, -(-(i + 1) * num_in // num_out)
        matrix[i, first:past] = 1 / (past - first)
    return matrix


def averaging_grid(grid_HW: Grid, pooled: Grid) -> np.ndarray:
    """float32 [h * w, H * W]: every bin's shares of the tokens of a grid, rows summing to 1."""
    return np.kron(averaging_matrix(grid_HW[0], pooled[0]), averaging_matrix(grid_HW[1], pooled[1]))


def bin_means(
    pool_QN: np.ndarray, tokens_BNC: jax.Array, valid_BN: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The mean over each bin's valid tokens, in the tokens' type, and which bins have any (None without a mask).

    Args:
        pool_QN: from `averaging_grid`.
        tokens_BNC: 0 where not valid.
    """
    # float32: 1/9 in bfloat16 is off by 1/500, and then the nine shares of a bin no longer sum to 1.
    mean_BQC = jnp.einsum("QN,BNC->BQC", pool_QN, tokens_BNC.astype(jnp.float32))
    if valid_BN is None:
        return mean_BQC.astype(tokens_BNC.dtype), None
    mass_BQ = jnp.einsum("QN,BN->BQ", pool_QN, valid_BN.astype(jnp.float32))
    valid_BQ = mass_BQ > 0
    mean_BQC = mean_BQC / jnp.where(valid_BQ, mass_BQ, 1)[..., None]
    return mean_BQC.astype(tokens_BNC.dtype), valid_BQ
