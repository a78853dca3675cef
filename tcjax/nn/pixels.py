"""Bytes -> normalised pixels on the device, bit for bit what the host's float32 arithmetic gives.

    value * scale - shift,   scale = 1 / (255 std),   shift = mean / std          two roundings, after * and after -

A compiler is free to fuse a product with a difference into one rounding, and then the last bit differs from backend to
backend. So the product is a sum of two exact ones, whose own rounding is that of value * scale: the scale's upper and lower
twelve bits, each times a byte, fit into float32's twenty-four.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tcjax.config import Pixels


def normalised(images_BYX3: jax.Array, pixels: Pixels, dtype: jnp.dtype) -> jax.Array:
    """Pixels as the tower wants them, in `dtype`; what is no uint8 is normalised already and stays as it is."""
    if images_BYX3.dtype != jnp.uint8:
        return images_BYX3
    scale_3 = (1 / (255 * np.asarray(pixels.std, np.float64))).astype(np.float32)
    shift_3 = (np.asarray(pixels.mean, np.float64) / np.asarray(pixels.std, np.float64)).astype(np.float32)
    upper_3 = (scale_3.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    values_BYX3 = images_BYX3.astype(jnp.float32)
    product_BYX3 = values_BYX3 * upper_3 + values_BYX3 * (scale_3 - upper_3)
    return (product_BYX3 - shift_3).astype(dtype)
