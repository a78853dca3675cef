"""Normalisation with torch's numerics: statistics in float32, variance as the mean of squared deviations, eps stated.

flax's own defaults (eps 1e-6, variance by E[x^2] - E[x]^2) are off by 1e-2 on features with a large mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis."""

    def __init__(self, axis: str, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)), axes=axis)
        self.bias = nnx.Param(jnp.zeros((width,)), axes=axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        unit = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), cast to x's type, then times scale: the order of Llama, Qwen and Mistral."""

    def __init__(self, axis: str, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)), axes=axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        unit = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * unit.astype(x.dtype)
