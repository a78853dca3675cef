"""Decoder-only LLM: embed(tokens_BS) -> seq_BSD -> hidden_BSD -> logits_BSV, and a cache to generate with.

    per block:  x += attention(norm(x));  x += down(silu(gate(norm(x))) * up(norm(x)))

One file is Llama and Vicuna, Mistral (a sliding window), Qwen2 and 2.5 (biases on q, k, v), Qwen3 (q and k normed per
head) and SmolLM2 by config. Sources: Touvron et al. 2023 (Llama), Ainslie et al. 2023 (grouped queries), Jiang et al. 2023
(Mistral), the Qwen2 and Qwen3 reports; checked against `transformers` in tests/test_decoder.py. Positions count valid
tokens only, so left and right padding agree; a window counts them likewise.
Cost per token and layer: 2 (2 D K A + 2 D J A + 3 D F) FLOPs plus 4 M K A for attention to M positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.interop.lines import linear
from tcjax.interop.names import Name
from tcjax.llms.rope import Rotation, Scaling, frequencies, rotate, rotation
from tcjax.nn import layers
from tcjax.nn.attention import attend, attend_causally
from tcjax.nn.dense import dense
from tcjax.nn.norm import RMSNorm
from tcjax.sharding import as_looked_up, constrain, whole


@dataclass(frozen=True, kw_only=True)
class LlmConfig:
    """A decoder's published numbers. Read them from the checkpoint's config: library defaults differ.

    vocab: rows of the embedding, padding rows included. kv_heads: key/value heads, shared by heads / kv_heads each.
    head_width: A; heads * head_width need not be width (Qwen3). tie: the head is the embedding transposed.
    window: positions that one sees, itself included (Mistral 0.1: 4096); None sees all before it.
    weights: path of published safetensors ("": from the seed); loaded by whoever builds the run.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    rope_theta: float
    rope_scaling: Scaling | None = None
    norm_eps: float
    tie: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    weights: str = ""

    def __post_init__(self):
        sizes = (self.vocab, self.width, self.layers, self.heads, self.kv_heads, self.head_width, self.feed_forward)
        if min(sizes) < 1:
            raise ValueError(f"every size must be at least 1, but this is {self}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even: rotary positions turn pairs.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, a position itself; None sees all before it.")

    def build(self, rngs: nnx.Rngs) -> Decoder:
        return Decoder(self, rngs=rngs)


class Cache(NamedTuple):
    """What decoding remembers: keys (already turned) and values of M positions, of which the first `used` are filled.

    valid_BM: bool, False on padding and on positions not filled yet. used: int32 scalar, the same for every row,
    so prompts of different lengths are padded on the left.
    """

    key_LBMJA: jax.Array
    value_LBMJA: jax.Array
    valid_BM: jax.Array
    used: jax.Array


class Decoder(nnx.Module):
    """cfg: the numbers it was built from."""

    def __init__(self, cfg: LlmConfig, *, rngs: nnx.Rngs):
        self.cfg, self.remat, self.packed = cfg, "none", False  # `tcjax.train.state.recompute` switches
        # 1 / sqrt(D), not Llama's 0.02 (which is that at D = 2500): a tied head then starts with logits of about 1, and
        # what a word is does not drown in the first block's output.
        rows = initializers.normal(cfg.width**-0.5)
        self.embedding = nnx.Param(rows(rngs.params(), (cfg.vocab, cfg.width)), axes="VD")
        self.blocks = layers.stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.norm = RMSNorm("D", cfg.width, eps=cfg.norm_eps)
        if not cfg.tie:
            self.head = nnx.Param(rows(rngs.params(), (cfg.vocab, cfg.width)), axes="VD")

    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        """seq_BSD of text ids."""
        return constrain(as_looked_up(jnp.take(self.embedding[...], tokens_BS, axis=0), "BSD"), "BSD")

    def __call__(
        self, seq_BSD: jax.Array, valid_BS: jax.Array | None = None, segment_BS: jax.Array | None = None
    ) -> jax.Array:
        """hidden_BSD after the final norm.

        Args:
            valid_BS: False on padding, anywhere; None means all are valid.
            segment_BS: contiguous segments 1, 2, ... behind a shared segment 0. Each sees segment 0 and itself, and its
                positions go on from segment 0: one row equals as many rows of segment 0 with one segment each.
        """
        hidden_BSD, _ = self._run_causally(seq_BSD, _all_valid(seq_BSD, valid_BS), segment_BS, keep=False)
        return hidden_BSD

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """logits_BSV in float32, before any softmax."""
        return jnp.einsum("BSD,VD->BSV", hidden_BSD, self.table_VD, preferred_element_type=jnp.float32)

    @property
    def table_VD(self) -> jax.Array:
        """The head's rows: hidden_BSD @ table_VD.T are the logits."""
        return whole(self.embedding[...] if self.cfg.tie else self.head[...], "VD")

    def prefill(self, seq_BSD: jax.Array, valid_BS: jax.Array | None, room: int) -> tuple[jax.Array, Cache]:
        """hidden_BSD of a whole prompt, padded on the left, and a cache with `room` more positions (M = S + room)."""
        valid_BS = _all_valid(seq_BSD, valid_BS)
        hidden_BSD, (key_LBSJA, value_LBSJA) = self._run_causally(seq_BSD, valid_BS, None, keep=True)
        behind = ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))
        cache = Cache(
            key_LBMJA=jnp.pad(key_LBSJA, behind),
            value_LBMJA=jnp.pad(value_LBSJA, behind),
            valid_BM=jnp.pad(valid_BS, ((0, 0), (0, room))),
            used=jnp.int32(seq_BSD.shape[1]),
        )
        return hidden_BSD, cache

    def extend(self, seq_BSD: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """hidden_BSD of S new positions (usually 1, all valid) and the cache with them.

        The caller keeps `used + S <= M`: `used` is a traced value, so running out of room cannot raise here.
        """
        (B, S, _), M = seq_BSD.shape, cache.valid_BM.shape[1]
        if S > M:
            raise ValueError(f"{S} new positions do not fit a cache of {M}; give prefill room >= {S}.")
        positions_BS = cache.valid_BM.sum(-1, dtype=jnp.int32)[:, None] + jnp.arange(S)
        valid_BM = jax.lax.dynamic_update_slice(cache.valid_BM, jnp.ones((B, S), bool), (0, cache.used))
        past_SM = jnp.arange(M)[None, :] <= cache.used + jnp.arange(S)[:, None]
        mask_BSM = valid_BM[:, None] & past_SM
        if self.cfg.window is not None:
            mask_BSM &= positions_BS[:, :, None] - _positions(valid_BM, None)[:, None] < self.cfg.window

        def look(query_BSKA, key_BSJA, value_BSJA, cached):
            key_BMJA, value_BMJA = (
                jax.lax.dynamic_update_slice(old_BMJA, new_BSJA, (0, cache.used, 0, 0))
                for old_BMJA, new_BSJA in zip(cached, (key_BSJA, value_BSJA), strict=True)
            )
            return attend(query_BSKA, key_BMJA, value_BMJA, mask_BSM=mask_BSM), (key_BSJA, value_BSJA)

        hidden_BSD, (key_LBSJA, value_LBSJA) = self._run(
            seq_BSD, positions_BS, look, inputs=(cache.key_LBMJA, cache.value_LBMJA)
        )
        start = (0, 0, cache.used, 0, 0)  # one write for all layers, in place when the cache is donated
        cache = Cache(
            key_LBMJA=jax.lax.dynamic_update_slice(cache.key_LBMJA, key_LBSJA, start),
            value_LBMJA=jax.lax.dynamic_update_slice(cache.value_LBMJA, value_LBSJA, start),
            valid_BM=valid_BM,
            used=cache.used + S,
        )
        return hidden_BSD, cache

    def _run_causally(
        self, seq_BSD: jax.Array, valid_BS: jax.Array, segment_BS: jax.Array | None, *, keep: bool
    ) -> tuple[jax.Array, Any]:
        positions_BS = _positions(valid_BS, segment_BS)

        def look(query_BSKA, key_BSJA, value_BSJA, _):
            mixed_BSKA = attend_causally(
                query_BSKA,
                key_BSJA,
                value_BSJA,
                valid_BS=valid_BS,
                segment_BS=segment_BS,
                shared=not self.packed,
                positions_BS=positions_BS,
                window=self.cfg.window,
            )
            return mixed_BSKA, (key_BSJA, value_BSJA) if keep else None

        return self._run(seq_BSD, positions_BS, look)

    def _run(self, seq_BSD: jax.Array, positions_BS: jax.Array, look: Look, *, inputs=None) -> tuple[jax.Array, Any]:
        """All blocks and the final norm; `look` gets each layer's input and its second result is stacked over L."""
        cfg = self.cfg
        magnitude = 1.0 if cfg.rope_scaling is None else cfg.rope_scaling.magnitude
        turn = rotation(positions_BS, frequencies(cfg.head_width, cfg.rope_theta, cfg.rope_scaling), magnitude)

        def step(block: Block, x_BSD: jax.Array, layer_input):
            return block(x_BSD, turn, lambda *heads: look(*heads, layer_input))

        hidden_BSD, kept = layers.run(self.blocks, step, seq_BSD, inputs=inputs, remat=self.remat)
        return self.norm(hidden_BSD), kept


# Who sees what: (query_BSKA, key_BSJA, value_BSJA[, the layer's input]) -> mixed_BSKA, what to keep of this layer.
Look = Callable[..., tuple[jax.Array, object]]


class Block(nnx.Module):
    """Pre-norm attention and gated MLP. The projections into the residual start sqrt(2 layers) smaller."""

    def __init__(self, cfg: LlmConfig, *, rngs: nnx.Rngs):
        D, F = cfg.width, cfg.feed_forward
        into_residual = initializers.variance_scaling(0.5 / cfg.layers, "fan_in", "normal")
        self.attention_norm = RMSNorm("D", D, eps=cfg.norm_eps)
        self.attention = Attention(cfg, into_residual, rngs=rngs)
        self.mlp_norm = RMSNorm("D", D, eps=cfg.norm_eps)
        self.gate = dense("DF", D, F, bias=cfg.mlp_bias, rngs=rngs)
        self.up = dense("DF", D, F, bias=cfg.mlp_bias, rngs=rngs)
        self.down = dense("FD", F, D, bias=cfg.mlp_bias, init=into_residual, rngs=rngs)

    def __call__(self, x_BSD: jax.Array, turn: Rotation, look: Look) -> tuple[jax.Array, object]:
        mixed_BSD, kept = self.attention(self.attention_norm(x_BSD), turn, look)
        x_BSD = x_BSD + mixed_BSD
        normed_BSD = self.mlp_norm(x_BSD)
        gated_BSF = jax.nn.silu(self.gate(normed_BSD)) * self.up(normed_BSD)
        return x_BSD + self.down(gated_BSF), kept


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; `look` decides what is seen and what is kept."""

    def __init__(self, cfg: LlmConfig, out_init: initializers.Initializer, *, rngs: nnx.Rngs):
        D, A = cfg.width, cfg.head_width
        self.head_width = A
        self.query = dense("DE", D, cfg.heads * A, bias=cfg.qkv_bias, rngs=rngs)
        self.key = dense("DI", D, cfg.kv_heads * A, bias=cfg.qkv_bias, rngs=rngs)
        self.value = dense("DI", D, cfg.kv_heads * A, bias=cfg.qkv_bias, rngs=rngs)
        self.out = dense("ED", cfg.heads * A, D, bias=cfg.out_bias, init=out_init, rngs=rngs)
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm:
            self.query_norm = RMSNorm("A", A, eps=cfg.norm_eps)
            self.key_norm = RMSNorm("A", A, eps=cfg.norm_eps)

    def __call__(self, x_BSD: jax.Array, turn: Rotation, look: Look) -> tuple[jax.Array, object]:
        B, S, _ = x_BSD.shape
        query_BSKA, key_BSJA, value_BSJA = (
            project(x_BSD).reshape(B, S, -1, self.head_width) for project in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            query_BSKA, key_BSJA = self.query_norm(query_BSKA), self.key_norm(key_BSJA)
        mixed_BSKA, kept = look(rotate(query_BSKA, turn), rotate(key_BSJA, turn), value_BSJA)
        return self.out(mixed_BSKA.reshape(B, S, -1)), kept


def _positions(valid_BS: jax.Array, segment_BS: jax.Array | None) -> jax.Array:
    """The rank among the valid positions; a segment goes on from segment 0. Padding may get any position: nobody sees it."""
    rank_BS = jnp.maximum(jnp.cumsum(valid_BS, axis=1, dtype=jnp.int32) - 1, 0)
    if segment_BS is None:
        return rank_BS
    begins_BS = segment_BS != jnp.pad(segment_BS, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    first_BS = jax.lax.cummax(jnp.where(begins_BS, rank_BS, 0), axis=1)
    shared_B1 = (valid_BS & (segment_BS == 0)).sum(1, keepdims=True, dtype=jnp.int32)
    return jnp.where(segment_BS == 0, rank_BS, rank_BS - first_BS + shared_B1)


def _all_valid(seq_BSD: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
    """valid_BS as bool, all True if None; ValueError if it belongs to another sequence."""
    if valid_BS is None:
        return jnp.ones(seq_BSD.shape[:2], bool)
    if valid_BS.shape != seq_BSD.shape[:2]:
        raise ValueError(
            f"valid_BS is {list(valid_BS.shape)}, but seq_BSD is {list(seq_BSD.shape)}; B and S must agree."
        )
    return valid_BS.astype(bool)


def names(cfg: LlmConfig) -> list[Name]:
    """Leaf of `cfg.build` <-> tensor of the published Llama, Mistral and Qwen checkpoints."""
    table = [
        Name("embedding", "model.embed_tokens.weight", "same"),
        Name("norm/scale", "model.norm.weight", "same"),
    ]
    if not cfg.tie:
        table.append(Name("head", "lm_head.weight", "same"))
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if cfg.qk_norm:
        norms |= {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
    for ours, theirs in norms.items():
        table.append(Name(f"blocks/{ours}/scale", f"{_LAYER}{theirs}.weight", "same"))
    for biases, kinds in _DENSE.items():
        for ours, theirs in kinds.items():
            table += linear(f"blocks/{ours}", f"{_LAYER}{theirs}", bias=getattr(cfg, biases))
    return table


def ignore(cfg: LlmConfig) -> list[str]:
    """Regular expressions of published tensors this decoder has no use for; each must match a whole name.

    Old Llama checkpoints store the rotary frequencies; some tied ones store the embedding a second time.
    """
    patterns = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if cfg.tie:
        patterns.append(r"lm_head\.weight")
    return patterns


_LAYER = "model.layers.{L}."
_DENSE = {  # by the field that says whether they have biases
    "qkv_bias": {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
    },
    "out_bias": {"attention/out": "self_attn.o_proj"},
    "mlp_bias": {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}
