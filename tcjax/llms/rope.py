"""Rotary position embedding, the rotate-half form of Llama and Qwen checkpoints.

    pair (x_i, x_{i + A/2}) turns by the angle  position * theta^(-2i / A),   i = 0 ... A/2 - 1

so a query and a key at distance d meet at the angle d * frequency: only differences of positions matter.
Sources: Su et al. 2021 (RoFormer); the llama3 scaling from Meta's release of Llama 3.1. Tables are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1+: waves longer than original / low slow down by `factor`, shorter than original / high stay.

    factor: 8 for Llama 3.1, 32 for Llama 3.2. original: positions of the first training.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


class Rotation(NamedTuple):
    """cos_BSA and sin_BSA over the full head width; the sine's first half carries the minus sign."""

    cos_BSA: jax.Array
    sin_BSA: jax.Array


def frequencies(width_A: int, theta: float, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """float32 [A / 2], radians per position. frequencies(4, 1e4) is [1, 0.01]."""
    plain = theta ** -(np.arange(0, width_A, 2) / width_A)
    if scaling is None:
        return plain.astype(np.float32)
    wavelength = 2 * pi / plain
    blend = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
    kept = np.clip(blend, 0, 1)
    return (kept * plain + (1 - kept) * plain / scaling.factor).astype(np.float32)


def rotation(positions_BS: jax.Array, frequencies: np.ndarray) -> Rotation:
    """The tables for these positions, made once and used by every layer."""
    angles = positions_BS[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


def rotate(heads_BSKA: jax.Array, turn: Rotation) -> jax.Array:
    """Queries or keys turned by their positions, computed in float32, in the type they came in."""
    swapped_BSKA = jnp.roll(heads_BSKA, heads_BSKA.shape[-1] // 2, axis=-1)
    turned_BSKA = heads_BSKA * turn.cos_BSA[:, :, None] + swapped_BSKA * turn.sin_BSA[:, :, None]
    return turned_BSKA.astype(heads_BSKA.dtype)
