"""Normalisation with torch's numerics: statistics in float32, variance as the mean of squared deviations, eps stated.

flax's own defaults (eps 1e-6, variance by E[x^2] - E[x]^2) are off by 1e-2 on features with a large mean. The derivative
is written out, dx = (g - mean g - u mean(g u)) / sigma for u = (x - mean x) / sigma, because what JAX derives computes
1 / sigma anew for every element, which a CPU feels: 2304 x 1024 forward and backward, 23 ms against 4 (2 cores, Intel Xeon).
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
        unit = unit_scale(x.astype(jnp.float32), self.eps, True)
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), cast to x's type, then times scale: the order of Llama, Qwen and Mistral."""

    def __init__(self, axis: str, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)), axes=axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        unit = unit_scale(x.astype(jnp.float32), self.eps, False).astype(x.dtype)
        return self.scale[...].astype(x.dtype) * unit


def _unit_scale(x: jax.Array, eps: float, centred: bool) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, of the deviations from the mean if `centred`."""
    return _forward(x, eps, centred)[0]


def _forward(x: jax.Array, eps: float, centred: bool):
    if centred:
        x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + eps)
    unit = x * inverse
    return unit, (unit, inverse)


def _backward(_eps: float, centred: bool, saved: tuple[jax.Array, jax.Array], grad: jax.Array):
    unit, inverse = saved
    along = grad - unit * (grad * unit).mean(-1, keepdims=True)
    if centred:
        along = along - grad.mean(-1, keepdims=True)
    return (inverse * along,)


unit_scale = jax.custom_vjp(_unit_scale, nondiff_argnums=(1, 2))
unit_scale.defvjp(_forward, _backward)
