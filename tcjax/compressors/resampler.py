"""Perceiver resampler: Q learned latents read the image through L layers of cross-attention, and see each other.

    z <- z + W_o softmax(q k^T / sqrt(A)) v        q = LN(z) W_q,  [k | v] = [LN(x) ; LN(z)] W_kv
    z <- z + W_2 gelu(W_1 LN(z))                   L times; then y = W_out LN(z)

The keys are the image first, the latents last; x itself is never updated. Nothing knows the grid: any N will do.

Source: Alayrac et al. 2022, "Flamingo", as mlfoundations/open_flamingo builds it: no biases, exact GELU, LayerNorm
eps 1e-5, latents drawn from N(0, 1), linear layers as torch draws them.
Departures: W_out (C -> D, with bias) is ours; Flamingo projects in the LLM's own cross-attention layers. No frame or
media embeddings: an image is one frame of one medium. Padding is masked out of the keys; an image without any valid
token has no valid output.
Cost: per layer (2 Q + 2 (N + Q)) C E + 2 Q (N + Q) E + 2 ff_mult Q C^2 multiplications, E = heads * head_width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, check_width, masked, shares, visible
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import attend, attention_weights
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.layers import run, stack
from tcjax.nn.norm import LayerNorm

_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Config:
    """OpenFlamingo's sizes. depth: layers L. heads, head_width: K, A; K * A need not be C. ff_mult: F = ff_mult * C."""

    num_queries: int = 64
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    ff_mult: int = 4

    def outputs(self, widths: Widths) -> int:
        if self.num_queries < 1:
            raise ValueError(f"num_queries={self.num_queries}: a resampler has any whole number of latents from 1 up.")
        return self.num_queries

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Resampler:
        return Resampler(self, widths, rngs=rngs)


class Resampler(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        for name in ("depth", "heads", "head_width", "ff_mult"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        C, D = widths.vision_C, widths.llm_D
        self.latents = nnx.Param(rngs.params.normal((self.num_outputs, C)), axes="QC")
        self.layers = stack(lambda rngs: _Layer(config, C, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm("C", C, eps=_EPS)
        self.out_proj = dense("CD", C, D, init=torch_uniform, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_width(tokens_BNC, self.widths)
        media_BNC = visible(tokens_BNC, context)
        B, Q = len(tokens_BNC), self.num_outputs
        mask_BSM = valid_BQ = None
        if context.valid_BN is not None:
            mask_BSM = jnp.concatenate([context.valid_BN, jnp.ones((B, Q), bool)], axis=1)[:, None]
            valid_BQ = jnp.broadcast_to(context.valid_BN.any(-1, keepdims=True), (B, Q))
        latents_QC = self.latents[...]
        dtype = jnp.result_type(latents_QC, media_BNC)
        latents_BQC = jnp.broadcast_to(latents_QC.astype(dtype), (B, *latents_QC.shape))

        def step(layer: _Layer, latents_BQC: jax.Array, _):
            return layer(latents_BQC, media_BNC, mask_BSM, assign=context.assign)

        latents_BQC, assign_LBQN = run(self.layers, step, latents_BQC)
        assign_BQN = None if assign_LBQN is None else shares(assign_LBQN[-1], context.valid_BN)
        return Compressed(masked(self.out_proj(self.norm(latents_BQC)), valid_BQ), valid_BQ, assign_BQN)


class _Layer(nnx.Module):
    """One cross-attention and one feed-forward, both residual on the un-normed latents."""

    def __init__(self, config: Config, C: int, *, rngs: nnx.Rngs):
        E, F = config.heads * config.head_width, config.ff_mult * C
        linear = partial(dense, bias=False, init=torch_uniform, rngs=rngs)
        self.heads = config.heads
        self.norm_media = LayerNorm("C", C, eps=_EPS)
        self.norm_latents = LayerNorm("C", C, eps=_EPS)
        self.to_q = linear("CE", C, E)
        self.to_kv = linear("CI", C, 2 * E)  # one kernel, keys in the first half: the published layout
        self.to_out = linear("EC", E, C)
        self.norm_ff = LayerNorm("C", C, eps=_EPS)
        self.ff_in = linear("CF", C, F)
        self.ff_out = linear("FC", F, C)

    def __call__(self, latents_BQC: jax.Array, media_BNC: jax.Array, mask_BSM: jax.Array | None, *, assign: bool):
        """The next latents, and if asked the head-mean of the attention to the N visual tokens, BQN."""
        normed_BQC = self.norm_latents(latents_BQC)
        seen_BMC = jnp.concatenate([self.norm_media(media_BNC), normed_BQC], axis=1)
        query_BQKA = self._heads(self.to_q(normed_BQC))
        key_BMI, value_BMI = jnp.split(self.to_kv(seen_BMC), 2, axis=-1)
        key_BMKA, value_BMKA = self._heads(key_BMI), self._heads(value_BMI)
        read_BQKA = attend(query_BQKA, key_BMKA, value_BMKA, mask_BSM=mask_BSM)
        latents_BQC = latents_BQC + self.to_out(read_BQKA.reshape(*read_BQKA.shape[:2], -1))
        hidden_BQF = ACTIVATIONS["gelu"](self.ff_in(self.norm_ff(latents_BQC)))
        latents_BQC = latents_BQC + self.ff_out(hidden_BQF)
        if not assign:
            return latents_BQC, None
        weights_BKQM = attention_weights(query_BQKA, key_BMKA, mask_BSM=mask_BSM)
        return latents_BQC, weights_BKQM.mean(1)[..., : media_BNC.shape[1]]

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)
