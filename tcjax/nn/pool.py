"""Adaptive pooling as two small averaging matrices, exactly torch's AdaptiveAvgPool2d, overlapping bins included.

bin i of `num_out` averages inputs floor(i n / o) ... ceil((i + 1) n / o) - 1
"""

from __future__ import annotations

import numpy as np


def averaging_matrix(num_in: int, num_out: int) -> np.ndarray:
    """float32 [num_out, num_in], rows summing to 1. 24 -> 10 overlaps by one, as torch's does."""
    matrix = np.zeros((num_out, num_in), np.float32)
    for i in range(num_out):
        first, past = i * num_in // num_out, -(-(i + 1) * num_in // num_out)
        matrix[i, first:past] = 1 / (past - first)
    return matrix
