"""Images of any shape: up to N patches per image on a grid of its own (SigLIP2's NaFlex, after NaViT).

    grids_B2 = (rows, columns) of each image; its patches are the first rows * columns of N, row by row, then padding
    position(r, c) = sum_y sum_x  w(y; r, rows) w(x; c, columns)  table(y, x)      w: bilinear, antialiased

The table is resized for every image by itself, which inside a program of fixed shapes is two rows of weights per patch.
Source: Tschannen et al. 2025, "SigLIP 2"; checked against transformers' Siglip2VisionModel in tests/test_vit_naflex.py.
Cost: 2 N H W C FLOPs per image for a table of H x W, 0.07 % of the blocks at so400m's sizes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def valid(grids_B2: jax.Array, num: int) -> jax.Array:
    """valid_BN: which of `num` patches are the image's own."""
    return jnp.arange(num) < grids_B2.prod(-1)[:, None]


def check_grids(grids_B2: jax.Array | None, batch: int) -> jax.Array:
    """The grids themselves; ValueError if there are none or they are not one pair per image."""
    if grids_B2 is None or grids_B2.shape != (batch, 2) or not jnp.issubdtype(grids_B2.dtype, jnp.integer):
        got = "none" if grids_B2 is None else f"{grids_B2.dtype}{list(grids_B2.shape)}"
        raise ValueError(
            f"this tower reads images of any shape and needs Batch.grids_B2, int32 [{batch}, 2]: rows and columns of every "
            f'image\'s patches, and got {got}; the pipeline fills it where Pixels.geometry is "naflex".'
        )
    return grids_B2


def positions(table_MC: jax.Array, table_HW: tuple[int, int], grids_B2: jax.Array, num: int) -> jax.Array:
    """The table [H * W, C] resized to each image's grid, float32 [B, num, C]; 0 at padding."""
    (H, W), place_N = table_HW, jnp.arange(num)
    sides_B2 = jnp.maximum(grids_B2, 1)  # a free slot's grid may be 0 x 0
    rows_B1, columns_B1 = sides_B2[:, :1], sides_B2[:, 1:]
    weights_BNH = _weights(place_N // columns_B1, rows_B1, H)
    weights_BNW = _weights(place_N % columns_B1, columns_B1, W)
    weights_BNHW = jnp.einsum("BNH,BNW->BNHW", weights_BNH, weights_BNW)
    weights_BNM = jnp.where(valid(grids_B2, num)[..., None], weights_BNHW.reshape(*weights_BNH.shape[:2], H * W), 0)
    return jnp.einsum("BNM,MC->BNC", weights_BNM, table_MC.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _weights(index_BN: jax.Array, num_out_B1: jax.Array, num_in: int) -> jax.Array:
    """float32 [B, N, num_in]: row `index` of torch's antialiased bilinear resizing of num_in places to num_out."""
    scale_BN1 = (num_in / num_out_B1.astype(jnp.float32))[..., None]
    source_BN1 = scale_BN1 * (index_BN[..., None] + 0.5)
    distance = jnp.abs(jnp.arange(num_in) + 0.5 - source_BN1) / jnp.maximum(scale_BN1, 1.0)
    weights = jnp.maximum(1.0 - distance, 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
