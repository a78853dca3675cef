"""Rotary position embedding, the rotate-half form of Llama, Mistral and Qwen checkpoints, and how it is stretched.

    pair (x_i, x_{i + A/2}) turns by the angle  position * theta^(-2i / A),   i = 0 ... A/2 - 1

so a query and a key at distance d meet at the angle d * frequency: only differences of positions matter. A scaling slows
some of the frequencies f down, so that longer sequences turn no further than those of the training did:

    linear    f / s                                  every position is divided by s
    llama3    f / s where the wave is long           blended between two wavelengths
    yarn      f / s where the wave is long           blended between two pairs; sine and cosine grow by 0.1 ln s + 1

"dynamic" (NTK) is not here: its frequencies follow the length of each batch, so keys that a cache turned before would be
wrong after. Up to the positions of the first training it is no scaling at all, which is its only fixed form.

Sources: Su et al. 2021 (RoFormer); Chen et al. 2023 (position interpolation); the llama3 scaling from Meta's release of
Llama 3.1; Peng et al. 2023 (YaRN). Tables are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every position counts 1 / factor."""

    factor: float

    @property
    def magnitude(self) -> float:
        return 1.0

    def slowed(self, plain: np.ndarray, theta: float) -> np.ndarray:
        return plain / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1+: waves longer than original / low slow down by `factor`, shorter than original / high stay.

    factor: 8 for Llama 3.1, 32 for Llama 3.2. original: positions of the first training.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    @property
    def magnitude(self) -> float:
        return 1.0

    def slowed(self, plain: np.ndarray, theta: float) -> np.ndarray:
        wavelength = 2 * pi / plain
        blend = (self.original / wavelength - self.low) / (self.high - self.low)
        kept = np.clip(blend, 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Pairs that turn more than `fast` times within `original` positions stay, less than `slow` times slow down.

    factor: 4 for the long contexts of Qwen2.5 and Qwen3. original: positions of the first training.
    attention: factor on sine and cosine, so that logits grow by its square; None is 0.1 ln(factor) + 1.
    truncate: the pairs between which it blends are whole numbers.
    """

    factor: float
    original: int
    attention: float | None = None
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        return grown(self.factor) if self.attention is None else self.attention

    def slowed(self, plain: np.ndarray, theta: float) -> np.ndarray:
        width_A = 2 * len(plain)

        def pair_that_turns(times: float) -> float:
            return width_A * math.log(self.original / (times * 2 * pi)) / (2 * math.log(theta))

        first, last = pair_that_turns(self.fast), pair_that_turns(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width_A - 1)
        last = last + 0.001 if first == last else last
        kept = 1 - np.clip((np.arange(len(plain)) - first) / (last - first), 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor


Scaling = LinearScaling | Llama3Scaling | YarnScaling


class Rotation(NamedTuple):
    """cos_BSA and sin_BSA over the full head width; the sine's first half carries the minus sign."""

    cos_BSA: jax.Array
    sin_BSA: jax.Array


def grown(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on sine and cosine for sequences `factor` times as long: 0.1 weight ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def frequencies(width_A: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """float32 [A / 2], radians per position. frequencies(4, 1e4) is [1, 0.01]."""
    plain = theta ** -(np.arange(0, width_A, 2) / width_A)
    return (plain if scaling is None else scaling.slowed(plain, theta)).astype(np.float32)


def rotation(positions_BS: jax.Array, frequencies: np.ndarray, magnitude: float = 1.0) -> Rotation:
    """The tables for these positions, made once and used by every layer."""
    angles = positions_BS[..., None].astype(jnp.float32) * frequencies
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    return Rotation(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


def rotate(heads_BSKA: jax.Array, turn: Rotation) -> jax.Array:
    """Queries or keys turned by their positions, computed in float32, in the type they came in."""
    swapped_BSKA = jnp.roll(heads_BSKA, heads_BSKA.shape[-1] // 2, axis=-1)
    turned_BSKA = heads_BSKA * turn.cos_BSA[:, :, None] + swapped_BSKA * turn.sin_BSA[:, :, None]
    return turned_BSKA.astype(heads_BSKA.dtype)
