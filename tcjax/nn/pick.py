"""Picking tokens by position: which ones in raster order, evenly spaced ones, and numbers that look random but are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def in_order(kept_BN: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The first `count` kept positions of each row, ascending, and which of these are kept: a row may have fewer."""
    order_BQ = jnp.argsort(~kept_BN, axis=1, stable=True)[:, :count]
    return order_BQ, jnp.take_along_axis(kept_BN, order_BQ, axis=1)


def spread(present_BN: jax.Array, count: int, wanted_B: jax.Array | int) -> jax.Array:
    """Flags of `wanted` evenly spaced ones of those present, all if there are fewer.

    Of V present, number i (from 0) is that of rank floor((2 i + 1) V / (2 wanted)): the middle of the i-th equal part.

    Args:
        count: static; no row wants more.
    """
    total_B, wanted_B = present_BN.sum(1), jnp.broadcast_to(jnp.asarray(wanted_B), len(present_BN))
    part = jnp.arange(count)
    rank_BQ = (2 * part + 1) * total_B[:, None] // (2 * jnp.maximum(wanted_B, 1)[:, None])
    rank_BQ = jnp.where(part < wanted_B[:, None], rank_BQ, -1)
    rank_BN = jnp.cumsum(present_BN, axis=1) - 1
    return present_BN & (rank_BN[:, None] == rank_BQ[..., None]).any(1)


def hashed(*numbers: jax.Array | int) -> jax.Array:
    """uint32 that depends on every number and looks random: two rounds of shift, exclusive or and multiplication each.

    The multipliers are odd and below 2^31, so that int64, all that torch has, holds every product.
    """
    x = jnp.uint32(0x9E3779B9)  # not 0, which hashes to 0
    for number in numbers:
        x = x ^ jnp.asarray(number).astype(jnp.uint32)
        x = (x ^ (x >> 16)) * jnp.uint32(0x45D9F3B)
        x = (x ^ (x >> 16)) * jnp.uint32(0x45D9F3B)
        x = x ^ (x >> 16)
    return x
