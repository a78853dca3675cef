"""Fixed position tables of the visual resamplers, and torch's ways to resize a grid: bicubic or bilinear, antialiased or not.

    table(r, c) = [sin(c w), cos(c w), sin(r w), cos(r w)]        w_k = 10000^(-k / (E / 4)), k = 0 ... E / 4 - 1

The first half encodes the column (He et al. 2022, "Masked Autoencoders", get_2d_sincos_pos_embed, whose variable "h"
is the column). Positions are integer patch indices from 0. All of it is numpy: tables are constants of a program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

_A = -0.75  # torch's bicubic; antialiased, torch's too is Keys' own -0.5, and so is that of jax.image.resize
_A_ANTIALIASED = -0.5


def sincos_2d(grid_HW: tuple[int, int], width: int) -> np.ndarray:
    """float32 [H * W, width], row by row. ValueError unless 4 divides the width."""
    if width % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width that 4 divides, not {width}.")
    H, W = grid_HW
    row_N, column_N = np.arange(H).repeat(W), np.tile(np.arange(W), H)
    return np.concatenate([sincos_1d(column_N, width // 2), sincos_1d(row_N, width // 2)], axis=1)


def sincos_1d(position_N: np.ndarray, width: int) -> np.ndarray:
    """float32 [N, width]: sines in the first half, cosines in the second."""
    # numpy's float32 power is off by its last bit on some machines: 6e-5 of a sine at position 1400, late in a video.
    power = 10000.0 ** (np.arange(width // 2, dtype=np.float32) / np.float32(width / 2.0)).astype(np.float64)
    rate = np.float32(1) / power.astype(np.float32)
    angle_NA = position_N.astype(np.float32)[:, None] * rate[None]
    return np.concatenate([np.sin(angle_NA), np.cos(angle_NA)], axis=1).astype(np.float32)


def square_side(most: int, rule: str) -> int:
    """sqrt(most), for `most` queries on a square grid; ValueError naming the squares around it."""
    side = math.isqrt(max(most, 0))
    if side * side != most or not side:
        raise ValueError(
            f"max_queries={most} is no square, but {rule} lays the queries on a square grid; near it are "
            f"{max(side, 1) ** 2} and {(side + 1) ** 2}. num_queries may be any number up to max_queries."
        )
    return side


def bicubic_matrix(num_in: int, num_out: int) -> np.ndarray:
    """float32 [num_out, num_in]: torch's interpolate(mode="bicubic", align_corners=False), without antialiasing."""
    matrix = np.zeros((num_out, num_in), np.float64)
    for i in range(num_out):
        source = (i + 0.5) * num_in / num_out - 0.5
        first = int(np.floor(source))
        for tap in range(first - 1, first + 3):
            matrix[i, min(max(tap, 0), num_in - 1)] += _cubic(abs(source - tap), _A)
    return matrix.astype(np.float32)


def resize_matrix(grid_HW: tuple[int, int], to_HW: tuple[int, int]) -> np.ndarray:
    """float32 [h * w, H * W]: bicubic resizing of a table over a grid, rows and columns at once."""
    return np.kron(bicubic_matrix(grid_HW[0], to_HW[0]), bicubic_matrix(grid_HW[1], to_HW[1]))


def bilinear_matrix(num_in: int, num_out: int) -> np.ndarray:
    """float32 [num_out, num_in]: torch's interpolate(mode="bilinear", align_corners=False), without antialiasing.

    Shrinking by 2 takes the mean of two, by 3 the middle one alone, by 4 the mean of the middle two.
    """
    matrix = np.zeros((num_out, num_in), np.float64)
    for i in range(num_out):
        source = max((i + 0.5) * num_in / num_out - 0.5, 0.0)
        first = int(source)
        matrix[i, first] += 1 - (source - first)
        matrix[i, min(first + 1, num_in - 1)] += source - first
    return matrix.astype(np.float32)


def antialiased_matrix(num_in: int, num_out: int, kernel: Callable[[float], float]) -> np.ndarray:
    """float32 [num_out, num_in]: torch's interpolate(antialias=True), a kernel as wide as what it averages.

    Taps outside the table are left out and the others weigh more. Growing, it is the kernel alone.
    """
    scale = num_in / num_out
    source_O = scale * (np.arange(num_out) + 0.5)
    distance_OI = np.abs(np.arange(num_in) + 0.5 - source_O[:, None]) / max(scale, 1.0)
    matrix = np.vectorize(kernel, otypes=[np.float64])(distance_OI)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def _cubic(distance: float, a: float) -> float:
    """Keys' kernel."""
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    if distance < 2:
        return ((distance - 5) * distance + 8) * distance * a - 4 * a
    return 0.0


RESIZES: dict[str, Callable[[int, int], np.ndarray]] = {
    "bicubic": bicubic_matrix,
    "bicubic antialiased": partial(antialiased_matrix, kernel=partial(_cubic, a=_A_ANTIALIASED)),
    "bilinear antialiased": partial(antialiased_matrix, kernel=lambda distance: max(1.0 - distance, 0.0)),
}
