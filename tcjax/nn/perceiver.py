"""Idefics2's perceiver layer: Q latents read a context and each other, with grouped queries and gated feed-forwards.

    z <- z + W_o softmax(q k^T / sqrt(A)) v            q = n(z) W_q,  k, v = [n'(x) ; n(z)] W_k, W_v
    z <- z + W_down (silu(W_gate m) * W_up m)          m = n''(z);  every n is an RMSNorm of its own

The keys are the context first, the latents last, both normed; the context x itself is never updated. No biases. Query
head k reads key/value head k // (heads / kv_heads).

Source: Laurencon et al. 2024, "What matters when building vision-language models?", Idefics2PerceiverLayer of
transformers. In the notation below E is the width of the latents and of the context, I that of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import attend, attention_weights
from tcjax.nn.dense import dense
from tcjax.nn.layers import run
from tcjax.nn.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class PerceiverSizes:
    """heads, kv_heads, head_width: K, J, A; K * A need not be the width. feed_forward: F. eps: of every norm."""

    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    eps: float

    def __post_init__(self):
        for name in ("heads", "kv_heads", "head_width", "feed_forward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.heads % self.kv_heads:
            fitting = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}; possible: {fitting}.")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps}: must be above 0, a norm of zeros divides by its root.")


class GatedMlp(nnx.Module):
    """y = down(silu(gate(x)) * up(x)) without biases. axes: letters of input, inner and output width, such as "CFD"."""

    def __init__(self, axes: str, sizes: tuple[int, int, int], *, init: initializers.Initializer, rngs: nnx.Rngs):
        linear = partial(dense, bias=False, init=init, rngs=rngs)
        self.gate = linear(axes[:2], *sizes[:2])
        self.up = linear(axes[:2], *sizes[:2])
        self.down = linear(axes[1:], *sizes[1:])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS["silu"](self.gate(x)) * self.up(x))


class PerceiverLayer(nnx.Module):
    """axis: the letter of the latents' width. init: of every kernel."""

    def __init__(self, axis: str, width: int, sizes: PerceiverSizes, *, init: initializers.Initializer, rngs: nnx.Rngs):
        linear = partial(dense, bias=False, init=init, rngs=rngs)
        inner, shared = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
        self.head_width = sizes.head_width
        self.norm_latents = RMSNorm(axis, width, eps=sizes.eps)
        self.norm_context = RMSNorm(axis, width, eps=sizes.eps)
        self.query = linear(f"{axis}I", width, inner)
        self.key = linear(f"{axis}I", width, shared)
        self.value = linear(f"{axis}I", width, shared)
        self.out = linear(f"I{axis}", inner, width)
        self.norm_mlp = RMSNorm(axis, width, eps=sizes.eps)
        self.mlp = GatedMlp(f"{axis}F{axis}", (width, sizes.feed_forward, width), init=init, rngs=rngs)

    def __call__(
        self, latents_BQE: jax.Array, context_BME: jax.Array, mask_BSM: jax.Array | None, *, assign: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """The next latents, and if asked the head-mean of the attention to the context, in float32.

        mask_BSM: of `key_mask`; its M counts the latents too.
        """
        normed_BQE = self.norm_latents(latents_BQE)
        seen_BME = jnp.concatenate([self.norm_context(context_BME), normed_BQE], axis=1)
        query_BQKA = self._heads(self.query(normed_BQE))
        key_BMJA, value_BMJA = self._heads(self.key(seen_BME)), self._heads(self.value(seen_BME))
        read_BQKA = attend(query_BQKA, key_BMJA, value_BMJA, mask_BSM=mask_BSM)
        latents_BQE = latents_BQE + self.out(read_BQKA.reshape(*read_BQKA.shape[:2], -1))
        latents_BQE = latents_BQE + self.mlp(self.norm_mlp(latents_BQE))
        if not assign:
            return latents_BQE, None
        key_BMKA = jnp.repeat(key_BMJA, query_BQKA.shape[2] // key_BMJA.shape[2], axis=2)
        weights_BKQM = attention_weights(query_BQKA, key_BMKA, mask_BSM=mask_BSM)
        return latents_BQE, weights_BKQM.mean(1)[..., : context_BME.shape[1]]

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_width)


def key_mask(
    context_BME: jax.Array, valid_BM: jax.Array | None, num_latents: int, active_B: jax.Array | None
) -> jax.Array | None:
    """bool [B, 1, M + Q], True for valid context and active latents; None if both are None, and all are seen.

    A row always sees a latent, so a context without anything valid is well defined: latents then read themselves only.
    """
    if valid_BM is None and active_B is None:
        return None
    valid_BM = jnp.ones(context_BME.shape[:2], bool) if valid_BM is None else valid_BM
    active_BQ = jnp.ones((len(context_BME), num_latents), bool)
    if active_B is not None:
        active_BQ = jnp.arange(num_latents) < active_B[:, None]
    return jnp.concatenate([valid_BM, active_BQ], axis=1)[:, None]


def read(
    layers: nnx.Module,
    latents_BQE: jax.Array,
    context_BME: jax.Array,
    mask_BSM: jax.Array | None,
    *,
    assign: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Through a stack of PerceiverLayers: the latents, and if asked the last layer's attention to the context."""

    def step(layer: PerceiverLayer, latents_BQE: jax.Array, _):
        return layer(latents_BQE, context_BME, mask_BSM, assign=assign)

    latents_BQE, weights_LBQM = run(layers, step, latents_BQE)
    return latents_BQE, None if weights_LBQM is None else weights_LBQM[-1]
