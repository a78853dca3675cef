"""Perceiver resampler: Q learned latents read the image through L layers of cross-attention, and see each other.

    x <- x + frame[f] + medium[t]                  learned, if asked for; added once, so to keys and values
    z <- z + W_o softmax(q k^T / sqrt(A)) v        q = LN(z) W_q,  [k | v] = [LN(x) ; LN(z)] W_kv
    z <- z + W_2 gelu(W_1 LN(z))                   L times; then y = W_out LN(z)

The keys are the image first, the latents last; x itself is never updated. Nothing knows the grid: any N will do. The
frames of a video are read together; each of several media has latents of its own.

Source: Alayrac et al. 2022, "Flamingo", as mlfoundations/open_flamingo builds it: no biases, exact GELU, LayerNorm
eps 1e-5, latents and embeddings drawn from N(0, 1), linear layers as torch draws them.
Departures: W_out (C -> D, with bias) is ours; Flamingo projects in the LLM's own cross-attention layers. Padding is
masked out of the keys, and so are latents that are not active (an elastic training's); an image without any valid token
has no valid output.
Cost: per layer (2 Q + 2 (N + Q)) C E + 2 Q (N + Q) E + 2 ff_mult Q C^2 multiplications, E = heads * head_width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
    Widths,
    any_valid,
    check_grid,
    check_width,
    handed_over,
    visible,
)
from tcjax.compressors.queries import PrefixConfig
from tcjax.interop.lines import linear, norm
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import attend, attention_weights
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.layers import run, stack
from tcjax.nn.norm import LayerNorm

_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """OpenFlamingo's sizes. depth: layers L. heads, head_width: K, A; K * A need not be C. ff_mult: F = ff_mult * C.

    max_frames: rows of frame embeddings, one per frame of a video; 0 has none.
    media: how many media the tokens are of, one after another, each giving num_queries tokens. max_media: rows of media
        embeddings, one per medium; 0 has none.
    """

    num_queries: int = 64
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    ff_mult: int = 4
    max_frames: int = 0
    media: int = 1
    max_media: int = 0

    def outputs(self, widths: Widths) -> int:
        self.weighted()
        return self.media * self.num_queries

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Resampler:
        return Resampler(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "any_num_tokens": not self.max_frames and self.media == 1,
            "num_queries": self.num_queries,
            "max_queries": self.weighted(),
            "max_frames": self.max_frames,
            "media": self.media,
            "max_media": self.max_media,
            "depth": self.depth,
            "heads": self.heads,
            "head_width": self.head_width,
            "feed_forward": self.ff_mult * widths.vision_C,
            "activation": "gelu",
            "norm_eps": _EPS,
            "attended_order": "image, latents",
            "kv_order": "keys, values",
        }

    def names(self, widths: Widths) -> list[Name]:
        """OpenFlamingo's perceiver; out_proj is ours."""
        table = [Name("latents", "latents"), *norm("norm", "norm"), *linear("out_proj", "out_proj")]
        table += [Name("frames", "frame_embs")] * bool(self.max_frames)
        table += [Name("media", "media_time_embs", "middle")] * bool(self.max_media)
        for ours, theirs in {"norm_media": "0.norm_media", "norm_latents": "0.norm_latents", "norm_ff": "1.0"}.items():
            table += norm(f"layers/{ours}", f"layers.{{L}}.{theirs}")
        kernels = {"to_q": "0.to_q", "to_kv": "0.to_kv", "to_out": "0.to_out", "ff_in": "1.1", "ff_out": "1.3"}
        for ours, theirs in kernels.items():
            table += linear(f"layers/{ours}", f"layers.{{L}}.{theirs}", bias=False)
        return table


class Resampler(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        for name in ("depth", "heads", "head_width", "ff_mult", "media"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
        frames = widths.frames // config.media
        if widths.frames % config.media or (config.max_frames and frames > config.max_frames):
            raise ValueError(
                f"{widths.frames} frames of {config.media} media do not fit max_frames={config.max_frames}: every "
                f"medium has the same number of frames, at most max_frames."
            )
        if config.max_media and config.media > config.max_media:
            raise ValueError(f"media={config.media} is more than max_media={config.max_media} embeddings.")
        self.widths, self.num_outputs, self.media_each = widths, config.outputs(widths), config.media
        self.num_latents, self.num_frames = config.num_queries, frames
        C, D = widths.vision_C, widths.llm_D
        most = config.weighted()
        self.latents = nnx.Param(rngs.params.normal((most, C)), axes="QC")
        self.frames = nnx.Param(rngs.params.normal((config.max_frames, C)), axes="HC") if config.max_frames else None
        self.media = nnx.Param(rngs.params.normal((config.max_media, C)), axes="HC") if config.max_media else None
        self.layers = stack(lambda rngs: _Layer(config, C, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm("C", C, eps=_EPS)
        self.out_proj = dense("CD", C, D, init=torch_uniform, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        one_image = self.frames is None and self.media_each == 1
        (check_width if one_image else check_grid)(tokens_BNC, self.widths)
        (B, _, C), Q = tokens_BNC.shape, self.num_latents
        media_BNC = self._embedded(visible(tokens_BNC, context))
        # From here on a medium is a row of its own.
        media_BNC = media_BNC.reshape(B * self.media_each, -1, C)
        own = (
            context
            if context.valid_BN is None
            else context._replace(valid_BN=context.valid_BN.reshape(len(media_BNC), -1))
        )
        if context.active_B is not None:
            own = own._replace(active_B=jnp.repeat(context.active_B, self.media_each))
        valid_BQ, mask_BSM = any_valid(media_BNC, own, Q), None
        if valid_BQ is not None:
            seen_BN = jnp.ones(media_BNC.shape[:2], bool) if own.valid_BN is None else own.valid_BN
            active_BQ = jnp.ones((len(media_BNC), Q), bool)
            if own.active_B is not None:
                active_BQ = jnp.arange(Q) < own.active_B[:, None]
            mask_BSM = jnp.concatenate([seen_BN, active_BQ], axis=1)[:, None]
        latents_QC = self.latents[...][:Q]
        dtype = jnp.result_type(latents_QC, media_BNC)
        latents_BQC = jnp.broadcast_to(latents_QC.astype(dtype), (len(media_BNC), *latents_QC.shape))

        def step(layer: _Layer, latents_BQC: jax.Array, _):
            return layer(latents_BQC, media_BNC, mask_BSM, assign=context.assign)

        latents_BQC, assign_LBQN = run(self.layers, step, latents_BQC)
        tokens_BQD = self.out_proj(self.norm(latents_BQC))
        assign_BQN = None if assign_LBQN is None else assign_LBQN[-1]
        return self._rejoined(handed_over(tokens_BQD, valid_BQ, assign_BQN, own), B)

    def _embedded(self, tokens_BNC: jax.Array) -> jax.Array:
        """With the embeddings of its frame and its medium added to every token."""
        if self.frames is None and self.media is None:
            return tokens_BNC
        B, N, C = tokens_BNC.shape
        split = tokens_BNC.reshape(B, self.media_each, self.num_frames, -1, C)
        if self.frames is not None:
            split = split + self.frames[...][: self.num_frames, None]
        if self.media is not None:
            split = split + self.media[...][: self.media_each, None, None]
        return split.reshape(B, N, C)

    def _rejoined(self, each: Compressed, B: int) -> Compressed:
        """The media of an image, which were rows of their own, one after another."""
        if self.media_each == 1:
            return each
        tokens_BQD = each.tokens_BQD.reshape(B, self.num_outputs, -1)
        valid_BQ = None if each.valid_BQ is None else each.valid_BQ.reshape(B, self.num_outputs)
        assign_BQN = each.assign_BQN
        if assign_BQN is not None:
            apart = assign_BQN.reshape(B, self.media_each, self.num_latents, 1, -1)
            same = jnp.eye(self.media_each)[:, None, :, None]
            assign_BQN = (apart * same).reshape(B, self.num_outputs, -1)
        return Compressed(tokens_BQD, valid_BQ, assign_BQN)


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
