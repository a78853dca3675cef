"""Pooling of a token grid: bins exactly as torch's AdaptiveAvgPool2d cuts them, overlapping ones included, and merging.

bin i of `num_out` covers inputs floor(i n / o) ... ceil((i + 1) n / o) - 1
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


def bin_shares(num_images: int, grid_HW: Grid, pooled: Grid) -> jax.Array:
    """`averaging_grid` once for each image, [B, h * w, H * W]: which tokens each bin is made of."""
    share_QN = averaging_grid(grid_HW, pooled)
    return jnp.broadcast_to(share_QN, (num_images, *share_QN.shape))


def bin_means(
    tokens_BNC: jax.Array, valid_BN: jax.Array | None, grid_HW: Grid, pooled: Grid
) -> tuple[jax.Array, jax.Array | None]:
    """The mean over each bin's valid tokens, in the tokens' type, and which bins have any (None without a mask).

    Args:
        tokens_BNC: 0 where not valid.
    """
    # float32: 1/9 in bfloat16 is off by 1/500, and then the nine shares of a bin no longer sum to 1.
    mean_BQC = _means(tokens_BNC.astype(jnp.float32), grid_HW, pooled)
    if valid_BN is None:
        return mean_BQC.astype(tokens_BNC.dtype), None
    mass_BQ = _means(valid_BN[..., None].astype(jnp.float32), grid_HW, pooled)[..., 0]
    valid_BQ = mass_BQ > 0
    mean_BQC = mean_BQC / jnp.where(valid_BQ, mass_BQ, 1)[..., None]
    return mean_BQC.astype(tokens_BNC.dtype), valid_BQ


def _means(tokens_BNC: jax.Array, grid_HW: Grid, pooled: Grid) -> jax.Array:
    (H, W), (height, width) = grid_HW, pooled
    if H % height or W % width:
        return jnp.einsum("QN,BNC->BQC", averaging_grid(grid_HW, pooled), tokens_BNC)
    # Whole windows: a sum of neighbours takes a tenth of the time of a product with a matrix of zeros.
    B, _, C = tokens_BNC.shape
    split = tokens_BNC.reshape(B, height, H // height, width, W // width, C)
    return split.mean((2, 4)).reshape(B, height * width, C)


def bin_maxima(tokens_BNC: jax.Array, grid_HW: Grid, pooled: Grid) -> jax.Array:
    """The largest value of each channel in each bin, [B, h * w, C]: torch's AdaptiveMaxPool2d."""
    (H, W), (height, width) = grid_HW, pooled
    grid_BHWC = tokens_BNC.reshape(len(tokens_BNC), H, W, -1)
    if H % height == 0 and W % width == 0:
        window = (1, H // height, W // width, 1)
        most = jax.lax.reduce_window(grid_BHWC, -jnp.inf, jax.lax.max, window, window, "VALID")
    else:
        # Gathered and not swept: the bins overlap. A repeated index changes no maximum.
        most = grid_BHWC[:, _members(H, height)].max(2)
        most = most[:, :, _members(W, width)].max(3)
    return most.reshape(len(tokens_BNC), height * width, -1)


def _members(num_in: int, num_out: int) -> np.ndarray:
    """[num_out, longest bin]: the indices of each bin, a shorter one's last repeated."""
    bins = [np.flatnonzero(row) for row in averaging_matrix(num_in, num_out)]
    longest = max(map(len, bins))
    return np.stack([np.pad(bin, (0, longest - len(bin)), mode="edge") for bin in bins])


def space_to_depth(
    tokens_BNC: jax.Array, grid_HW: Grid, factor: int, *, channels_first: bool = False, by_columns: bool = False
) -> jax.Array:
    """[B, N, C] -> [B, N / s^2, s * s * C], s = factor: the s x s tokens of each block side by side.

    Args:
        channels_first: the wide token runs (c, dy, dx) as torch's unfold and PixelUnshuffle, not (dy, dx, c).
        by_columns: the blocks come column by column, not row by row.
    """
    (H, W), s = grid_HW, factor
    B, _, C = tokens_BNC.shape
    split = tokens_BNC.reshape(B, H // s, s, W // s, s, C)
    blocks = (3, 1) if by_columns else (1, 3)
    inside = (5, 2, 4) if channels_first else (2, 4, 5)
    return split.transpose(0, *blocks, *inside).reshape(B, (H // s) * (W // s), s * s * C)


def masked_mean(x_BMD: jax.Array, valid_BM: jax.Array) -> jax.Array:
    """Over the valid positions; 0 where there is none."""
    sum_BD = jnp.where(valid_BM[..., None], x_BMD, 0).sum(1)
    return sum_BD / jnp.maximum(valid_BM.sum(1), 1)[:, None]
