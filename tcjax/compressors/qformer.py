"""Q-Former: a small BERT whose Q learned queries read the image in every second layer, told the question or not.

    h = LN([queries ; text + positions])                 the text only if `text`
    h <- LN(h + W_o softmax(q k^T / sqrt(A)) v)          queries and text see each other, nobody sees padding
    z <- LN(z + W_o' softmax(q' k'^T / sqrt(A)) v')      the queries z of h read the image, in layers 0, 2, 4, ...
    z <- LN(z + W_2 gelu(W_1 z))                         the text likewise, with weights of its own
    y = W_out z                                          after the last layer; the text's rows are dropped

Every norm comes after its residual sum, every linear layer has a bias. The image gets neither norm nor positions: any N.

Source: Li et al. 2023, "BLIP-2"; with text Dai et al. 2023, "InstructBLIP". Sizes, eps 1e-12, N(0, 0.02) for queries,
positions and kernels, and the names of transformers' Blip2 and InstructBlip classes, whose own random start has queries
of zeros. The last layer's feed-forward for text reaches no output; it stays because published files hold it.
Departures: no dropout (published 0.1). BLIP-2's 257 image tokens include the class token; here `class_token` says whether
the tower hands it over, and no weight knows.
The published start is BERT's weights, which an import brings. The text is embedded outside: InstructBLIP has BERT's word
embeddings, we take the LLM's, mapped by `text_proj` where their width is another; it is absent where they are equal. A
row without text (all masked) is InstructBLIP without it. Queries that are not active (an elastic training's) are masked
out of the keys. Image tokens are not normalised here; BLIP-2's tower ends in a LayerNorm (`ln_vision`).
Cost: per layer 4 S E^2 + 2 S^2 E + 2 S E F, S = Q + T, and every second one 2 Q E^2 + 2 N C E + 2 Q N E multiplications.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
    Need,
    Widths,
    any_valid,
    check_width,
    handed_over,
    read_text,
    visible,
)
from tcjax.compressors.queries import PrefixConfig
from tcjax.interop.lines import linear, norm
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import attend, attention_weights
from tcjax.nn.dense import dense, small_normal
from tcjax.nn.layers import run, stack
from tcjax.nn.norm import LayerNorm

_EPS = 1e-12
_linear = partial(dense, init=small_normal)


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """BLIP-2's sizes. depth: layers. width: E of the queries. heads: K, of E / K each. feed_forward: F.

    cross_every: the first of so many layers reads the image; it divides depth.
    class_token: reads the tower's class token too, as BLIP-2 does.
    text: conditioned on the instruction. max_text: rows of position embeddings, the longest instruction.
    """

    num_queries: int = 32
    depth: int = 12
    width: int = 768
    heads: int = 12
    feed_forward: int = 3072
    cross_every: int = 2
    class_token: bool = False
    text: bool = False
    max_text: int = 512

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  here a choice
        return ("text",) if self.text else ()

    def build(self, widths: Widths, rngs: nnx.Rngs) -> QFormer:
        return QFormer(self, widths, rngs=rngs)

    def of_tower(self) -> dict[str, Any]:
        return {"keep_class": True} if self.class_token else {}

    def maps_text(self, widths: Widths) -> bool:
        """Whether the text arrives in another width and `text_proj` maps it."""
        return self.text and widths.text_D != self.width

    def semantics(self, widths: Widths) -> dict:
        return {
            "any_num_tokens": True,
            "max_queries": self.weighted(),
            "depth": self.depth,
            "width": self.width,
            "heads": self.heads,
            "feed_forward": self.feed_forward,
            "cross_every": self.cross_every,
            "text": self.text,
            "max_text": self.max_text if self.text else 0,
            "activation": "gelu",
            "norm_eps": _EPS,
            "norm_order": "after the sum",
            "sequence_order": "queries, text",
        }

    def names(self, widths: Widths) -> list[Name]:
        """transformers' Blip2ForConditionalGeneration, or InstructBlip's with text; text_proj is ours."""
        table = [Name("queries", "query_tokens", "unsqueeze"), *linear("out_proj", "language_projection")]
        if self.text:
            table += norm("norm", "qformer.embeddings.layernorm")
            table += [Name("positions", "qformer.embeddings.position_embeddings.weight")]
        else:
            table += norm("norm", "qformer.layernorm")
        if self.maps_text(widths):
            table += linear("text_proj", "text_proj")
        for place in range(self.cross_every):
            layer = f"qformer.encoder.layer.{{{self.cross_every}L+{place}}}"
            table += _layer_names(f"groups/layers/{place}", layer, crosses=place == 0, text=self.text)
        return table


def _layer_names(ours: str, theirs: str, *, crosses: bool, text: bool) -> Iterator[Name]:
    attentions = {"self_attention": "attention"} | ({"cross_attention": "crossattention"} if crosses else {})
    for mine, published in attentions.items():
        for kernel in ("query", "key", "value"):
            yield from linear(f"{ours}/{mine}/{kernel}", f"{theirs}.{published}.attention.{kernel}")
        yield from linear(f"{ours}/{mine}/out", f"{theirs}.{published}.output.dense")
        yield from norm(f"{ours}/{mine}/norm", f"{theirs}.{published}.output.LayerNorm")
    for mine, suffix in ({"query_ff": "_query"} | ({"text_ff": ""} if text else {})).items():
        yield from linear(f"{ours}/{mine}/ff_in", f"{theirs}.intermediate{suffix}.dense")
        yield from linear(f"{ours}/{mine}/ff_out", f"{theirs}.output{suffix}.dense")
        yield from norm(f"{ours}/{mine}/norm", f"{theirs}.output{suffix}.LayerNorm")


class QFormer(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        _check(config, widths)
        self.widths, self.num_outputs, self.max_text = widths, config.outputs(widths), config.max_text
        E, most = config.width, config.weighted()
        self.queries = nnx.Param(small_normal(rngs.params(), (most, E)), axes="QE")
        self.positions = (
            nnx.Param(small_normal(rngs.params(), (config.max_text, E)), axes="TE") if config.text else None
        )
        self.text_proj = _linear("DE", widths.text_D, E, rngs=rngs) if config.maps_text(widths) else None
        self.norm = LayerNorm("E", E, eps=_EPS)
        num_groups = config.depth // config.cross_every
        self.groups = stack(lambda rngs: _Group(config, widths.vision_C, rngs=rngs), num_groups, rngs)
        self.out_proj = _linear("ED", E, widths.llm_D, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_width(tokens_BNC, self.widths)
        image_BNC, B, Q = visible(tokens_BNC, context), len(tokens_BNC), self.num_outputs
        queries_QE, known_BSM = self.queries[...][:Q], None
        parts, known = [jnp.broadcast_to(queries_QE, (B, *queries_QE.shape))], [_active(context, B, Q)]
        if self.positions is not None:
            text_BTE, text_valid_BT = self._text(context, self.positions[...])
            parts, known = [*parts, text_BTE], [*known, text_valid_BT]
        if self.positions is not None or context.active_B is not None:
            known_BSM = jnp.concatenate(known, axis=1)[:, None]
        dtype = jnp.result_type(image_BNC, *parts)
        hidden_BSE = self.norm(jnp.concatenate([part.astype(dtype) for part in parts], axis=1))
        reads = _Reads(image_BNC.astype(dtype), _seen(context), known_BSM)

        def step(group: _Group, hidden_BSE: jax.Array, _):
            return group(hidden_BSE, reads, Q, assign=context.assign)

        hidden_BSE, assign_LBQN = run(self.groups, step, hidden_BSE)
        assign_BQN = None if assign_LBQN is None else assign_LBQN[-1]
        return handed_over(self.out_proj(hidden_BSE[:, :Q]), any_valid(tokens_BNC, context, Q), assign_BQN, context)

    def _text(self, context: Context, positions_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The instruction with its positions, BTE, and which of it is real."""
        text_BTD, valid_BT = read_text(context, self.widths)
        if text_BTD.shape[1] > self.max_text:
            raise ValueError(
                f"context.text_BTD has {text_BTD.shape[1]} positions, but this compressor has max_text={self.max_text} "
                f"of them; cut the instruction (InstructBLIP keeps its last 128), or build with more."
            )
        text_BTE = text_BTD if self.text_proj is None else self.text_proj(text_BTD)
        return text_BTE + positions_TE[: text_BTD.shape[1]], valid_BT


@dataclass(frozen=True)
class _Reads:
    """What all layers read: image_BNC, seen_BSN its tokens that count, known_BSM the sequence's (S is 1; None: all)."""

    image_BNC: jax.Array
    seen_BSN: jax.Array | None
    known_BSM: jax.Array | None


class _Group(nnx.Module):
    """`cross_every` layers; the first one reads the image."""

    def __init__(self, config: Config, C: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([_Layer(config, C, place == 0, rngs=rngs) for place in range(config.cross_every)])

    def __call__(self, hidden_BSE: jax.Array, reads: _Reads, Q: int, *, assign: bool):
        """The next hidden states, and if asked the head-mean of the attention to the image, BQN."""
        assign_BQN = None
        for layer in self.layers:
            hidden_BSE, weights_BQN = layer(hidden_BSE, reads, Q, assign=assign)
            assign_BQN = assign_BQN if weights_BQN is None else weights_BQN
        return hidden_BSE, assign_BQN


class _Layer(nnx.Module):
    def __init__(self, config: Config, C: int, crosses: bool, *, rngs: nnx.Rngs):
        E, K, F = config.width, config.heads, config.feed_forward
        self.self_attention = _Attention("EE", E, E, K, rngs=rngs)
        self.cross_attention = _Attention("CE", C, E, K, rngs=rngs) if crosses else None
        self.query_ff = _FeedForward(E, F, rngs=rngs)
        self.text_ff = _FeedForward(E, F, rngs=rngs) if config.text else None

    def __call__(self, hidden_BSE: jax.Array, reads: _Reads, Q: int, *, assign: bool):
        hidden_BSE, _ = self.self_attention(hidden_BSE, hidden_BSE, reads.known_BSM, assign=False)
        query_BQE, text_BTE, weights_BQN = hidden_BSE[:, :Q], hidden_BSE[:, Q:], None
        if self.cross_attention is not None:
            query_BQE, weights_BQN = self.cross_attention(query_BQE, reads.image_BNC, reads.seen_BSN, assign=assign)
        query_BQE = self.query_ff(query_BQE)
        if self.text_ff is None:
            return query_BQE, weights_BQN
        return jnp.concatenate([query_BQE, self.text_ff(text_BTE)], axis=1), weights_BQN


class _Attention(nnx.Module):
    """LN(x + what x reads from a source of another width or itself), and if asked the head-mean of the weights, BSM."""

    def __init__(self, axes: str, num_in: int, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.query = _linear("EE", width, width, rngs=rngs)
        self.key = _linear(axes, num_in, width, rngs=rngs)  # its bias cancels in the softmax; published files have it
        self.value = _linear(axes, num_in, width, rngs=rngs)
        self.out = _linear("EE", width, width, rngs=rngs)
        self.norm = LayerNorm("E", width, eps=_EPS)

    def __call__(self, x_BSE: jax.Array, source: jax.Array, mask_BSM: jax.Array | None, *, assign: bool):
        query_BSKA, key_BMKA, value_BMKA = (
            projected.reshape(*projected.shape[:2], self.heads, -1)
            for projected in (self.query(x_BSE), self.key(source), self.value(source))
        )
        read_BSKA = attend(query_BSKA, key_BMKA, value_BMKA, mask_BSM=mask_BSM)
        x_BSE = self.norm(x_BSE + self.out(read_BSKA.reshape(x_BSE.shape)))
        if not assign:
            return x_BSE, None
        return x_BSE, attention_weights(query_BSKA, key_BMKA, mask_BSM=mask_BSM).mean(1)


class _FeedForward(nnx.Module):
    """LN(x + W_2 gelu(W_1 x))."""

    def __init__(self, width: int, feed_forward: int, *, rngs: nnx.Rngs):
        self.ff_in = _linear("EF", width, feed_forward, rngs=rngs)
        self.ff_out = _linear("FE", feed_forward, width, rngs=rngs)
        self.norm = LayerNorm("E", width, eps=_EPS)

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        return self.norm(x_BSE + self.ff_out(ACTIVATIONS["gelu"](self.ff_in(x_BSE))))


def _active(context: Context, B: int, Q: int) -> jax.Array:
    """Which queries are keys, BQ. The first one always is: a softmax needs one, and no query is valid then."""
    if context.active_B is None:
        return jnp.ones((B, Q), bool)
    return jnp.arange(Q) < jnp.maximum(context.active_B, 1)[:, None]


def _seen(context: Context) -> jax.Array | None:
    """Which image tokens are keys, BSN with S = 1. An empty image shows its zeros; none of its outputs is valid."""
    if context.valid_BN is None:
        return None
    return (context.valid_BN | ~context.valid_BN.any(-1, keepdims=True))[:, None]


def _check(config: Config, widths: Widths) -> None:
    for name in ("depth", "width", "heads", "feed_forward", "cross_every", "max_text"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
    if config.width % config.heads:
        raise ValueError(f"heads={config.heads} must divide width={config.width}.")
    if config.depth % config.cross_every:
        raise ValueError(
            f"cross_every={config.cross_every} must divide depth={config.depth}: the layers come in groups whose first "
            f"one reads the image."
        )
    if config.text and widths.text_D < 1:
        raise ValueError(
            "this compressor is conditioned on the question, but Widths.text_D is 0; build it with the LLM's own Widths."
        )
