"""Adaptive pooling as two small averaging matrices, exactly torch's AdaptiveAvgPool2d, overlapping bins included.

bin i of `num_out` averages inputs floor(i n / o) ... ceil((i + 1) n / o) - 1
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def averaging_matrix(num_in: int, num_out: int) -> np.ndarray:
    """float32 [num_out, num_in], rows summing to 1. 24 -> 10 overlaps by one, as torch's does."""
    matrix = np.zeros((num_out, num_in), np.float32)
    for i in range(num_out):
        first, past = i * num_in // num_out, -(-(i + 1) * num_in // num_out)
        matrix[i, first:past] = 1 / (past - first)
    return matrix


def masked_mean(x_BMD: jax.Array, valid_BM: jax.Array) -> jax.Array:
    """Over the valid positions; 0 where there is none."""
    sum_BD = jnp.where(valid_BM[..., None], x_BMD, 0).sum(1)
    return sum_BD / jnp.maximum(valid_BM.sum(1), 1)[:, None]
