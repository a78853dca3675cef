"""D-Abstractor: Q queries on a grid read the image around learnable reference points, as in Deformable DETR.

    v = W_in x + pos;   p = mean of v over each of h x w bins;   z = a learned embedding per query
    z <- LN(z + W_o softmax(q k^T / sqrt(A)) W_v z)          q = W_q (z + p),  k = W_k (z + p)
    z <- LN(z + W_c sum_m a_m V(r + o_m))                    o = W_off (z + p),  a = softmax_m(W_a (z + p))
    z <- LN(z + W_2 relu(W_1 z))                             depth times; then y = W_out z

Every head looks at `points` places m: its query's reference point r (learned, from a uniform grid over the image, used as
it is) plus an offset o_m in token widths. V is the values' map between the tokens, bilinear, and 0 outside the grid.

Here a look is a row of weights over all N tokens, bilinear weights times a_m, instead of a gather of 4 corners per point
(equal, derivatives too). That takes Q N E multiplications, 1/7 of the value projection's at published sizes, and no
scatter on the way back: on a CPU the gradient takes 0.4 of the gather's time (4 images, 576 tokens, 144 queries).

pooled_v_target: "query" is the above, p pooled and z learned; "tgt" swaps them; "none" learns both.
With padding, values of invalid tokens are 0 (Deformable DETR's own rule), so points that look there read less; p is the
mean over valid tokens. An image without any has no valid output. `assign` is the last layer's looks, head-mean; a query
all of whose points lie outside looks nowhere, and shares itself out equally.

Source: Cha et al. 2024, "Honeybee: Locality-enhanced Projector for Multimodal LLM" (kakaobrain/honeybee), decoder of
Zhu et al. 2021, "Deformable DETR". Departures: grids and poolings need not be square; masks; one feature level; no
dropout (0.1 there); no extra learned output tokens (0 in every published config).
Everything starts N(0, 0.02), biases 0, the offsets too: Honeybee overwrites Deformable DETR's ring of initial offsets.
ring_init=True keeps it, with what belongs to it: at first every head k looks in direction 2 pi k / heads from the
reference point, m tokens far with its point m, all alike weighted; values and their output start Xavier-uniform.
Cost: N E (C + L E) + L Q E (5 E + 2 F + N + 2 Q) multiplications per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
    Widths,
    any_valid,
    check_grid,
    handed_over,
    masked,
    visible,
)
from tcjax.compressors.queries import GridConfig
from tcjax.interop.lines import linear, norm
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import attend
from tcjax.nn.dense import dense, small_normal
from tcjax.nn.layers import run, stack
from tcjax.nn.norm import LayerNorm
from tcjax.nn.pool import bin_means

_EPS = 1e-5
_TARGETS = ("query", "tgt", "none")


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """Honeybee's sizes. num_queries: h * w. shape: (h, w) of the queries' grid; None takes the square.

    width: E of the decoder. depth, heads, points: layers L, heads K, places each head looks at. feed_forward: F.
    pooled_v_target: what the pooled image is to the queries, their position or their content. pos_emb: learned positions
        are added to the tokens.
    """

    num_queries: int = 144
    width: int = 1024
    depth: int = 6
    heads: int = 8
    points: int = 4
    feed_forward: int = 1024
    pooled_v_target: Literal["query", "tgt", "none"] = "query"
    pos_emb: bool = True
    ring_init: bool = False

    def build(self, widths: Widths, rngs: nnx.Rngs) -> DAbstractor:
        return DAbstractor(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "pooled": list(self.out_grid(widths)),
            "pooled_v_target": self.pooled_v_target,
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "points": self.points,
            "feed_forward": self.feed_forward,
            "pos_emb": self.pos_emb,
            "point_order": "x, y",
            "norm_order": "after",
            "norm_eps": _EPS,
            "activation": "relu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """Honeybee's abstractor, with the names of its time (transformers 4.38)."""
        table = [
            Name("queries", "query_position_embeddings.weight"),
            Name("reference_points", "reference_points", "unsqueeze"),
        ]
        table += [Name("pos", "v_pos_emb", "unsqueeze")] * self.pos_emb
        table += linear("input_proj", "input_proj.0") * (widths.vision_C != self.width)
        table += linear("output_proj", "output_proj") * (self.width != widths.llm_D)
        for ours, theirs in _LAYER_NORMS.items():
            table += norm(f"layers/{ours}", f"layers.{{L}}.{theirs}")
        for ours, theirs in _LAYER_LINEARS.items():
            table += linear(f"layers/{ours}", f"layers.{{L}}.{theirs}")
        return table


_LAYER_NORMS = {
    "attention_norm": "self_attn_layer_norm",
    "look_norm": "encoder_attn_layer_norm",
    "ff_norm": "final_layer_norm",
}
_LAYER_LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.out_proj",
    "offsets": "encoder_attn.sampling_offsets",
    "weights": "encoder_attn.attention_weights",
    "map": "encoder_attn.value_proj",
    "look_out": "encoder_attn.output_proj",
    "ff_in": "fc1",
    "ff_out": "fc2",
}


class DAbstractor(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        for name in ("width", "depth", "heads", "points", "feed_forward"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
        if config.width % config.heads:
            raise ValueError(f"heads={config.heads} must divide width={config.width}.")
        if config.pooled_v_target not in _TARGETS:
            raise ValueError(f"pooled_v_target={config.pooled_v_target!r} is none of {list(_TARGETS)}.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.pooled, self.target = config.out_grid(widths), config.pooled_v_target
        C, D, E, Q = widths.vision_C, widths.llm_D, config.width, self.num_outputs
        linear = partial(dense, init=small_normal, rngs=rngs)
        pos_NE = small_normal(rngs.params(), (widths.num_tokens, E), jnp.float32)
        queries_QI = small_normal(rngs.params(), (Q, 2 * E if self.target == "none" else E), jnp.float32)
        self.input_proj = linear("CE", C, E) if C != E else None
        self.pos = nnx.Param(pos_NE, axes="NE") if config.pos_emb else None
        self.queries = nnx.Param(queries_QI, axes="QI")
        # X: the two coordinates (x, y), 0 at the grid's left and upper border, 1 at the other.
        self.reference_points = nnx.Param(jnp.asarray(_uniform(widths.grid_HW, self.pooled)), axes="QX")
        self.layers = stack(lambda rngs: _Layer(config, widths.grid_HW, rngs=rngs), config.depth, rngs)
        self.output_proj = linear("ED", E, D) if E != D else None

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        tokens_BNE = visible(tokens_BNC, context)
        if self.input_proj is not None:
            tokens_BNE = self.input_proj(tokens_BNE)
        if self.pos is not None:
            tokens_BNE = tokens_BNE + self.pos[...]
        position_BQE, hidden_BQE = self._queries(tokens_BNE, context.valid_BN)
        points = self.reference_points[...]

        def step(layer: _Layer, hidden_BQE: jax.Array, _):
            return layer(hidden_BQE, position_BQE, tokens_BNE, points, context)

        out_BQD, assign_LBQN = run(self.layers, step, hidden_BQE)
        if self.output_proj is not None:
            out_BQD = self.output_proj(out_BQD)
        assign_BQN = None if assign_LBQN is None else _somewhere(assign_LBQN[-1], context.valid_BN)
        return handed_over(out_BQD, any_valid(tokens_BNC, context, self.num_outputs), assign_BQN, context)

    def _queries(self, tokens_BNE: jax.Array, valid_BN: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Where the queries stand, and what they hold at first."""
        (B, _, E), learned = tokens_BNE.shape, self.queries[...]
        dtype = jnp.result_type(tokens_BNE, learned)
        learned_BQI = jnp.broadcast_to(learned.astype(dtype), (B, *learned.shape))
        if self.target == "none":
            return learned_BQI[..., :E], learned_BQI[..., E:]
        seen_BNE = masked(tokens_BNE, valid_BN).astype(dtype)
        pooled_BQE, _ = bin_means(seen_BNE, valid_BN, self.widths.grid_HW, self.pooled)
        return (pooled_BQE, learned_BQI) if self.target == "query" else (learned_BQI, pooled_BQE)


class _Layer(nnx.Module):
    """Self-attention of the queries, a look at the image, a feed-forward; each residual, normed afterwards."""

    def __init__(self, config: Config, grid_HW: tuple[int, int], *, rngs: nnx.Rngs):
        E, K, M = config.width, config.heads, config.points
        linear = partial(dense, init=small_normal, rngs=rngs)
        self.heads, self.grid_HW = K, grid_HW
        self.query, self.key = linear("EI", E, E), linear("EI", E, E)
        self.value, self.attention_out = linear("EI", E, E), linear("IE", E, E)
        self.attention_norm = LayerNorm("E", E, eps=_EPS)
        steering, reading = (
            (initializers.zeros, initializers.xavier_uniform()) if config.ring_init else [small_normal] * 2
        )
        self.offsets = linear("EI", E, K * M * 2, init=steering)
        self.weights = linear("EI", E, K * M, init=steering)
        self.map, self.look_out = linear("EI", E, E, init=reading), linear("IE", E, E, init=reading)
        self.look_norm = LayerNorm("E", E, eps=_EPS)
        self.ff_in, self.ff_out = linear("EF", E, config.feed_forward), linear("FE", config.feed_forward, E)
        self.ff_norm = LayerNorm("E", E, eps=_EPS)
        if config.ring_init and self.offsets.bias is not None:
            self.offsets.bias.set_value(jnp.asarray(_ring(K, M)))

    def __call__(
        self, hidden_BQE: jax.Array, position_BQE: jax.Array, tokens_BNE: jax.Array, points: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array | None]:
        """The next hidden states, and if asked the head-mean of where they looked, BQN."""
        placed_BQE = hidden_BQE + position_BQE
        query_BQKA, key_BQKA = self._heads(self.query(placed_BQE)), self._heads(self.key(placed_BQE))
        read_BQKA = attend(query_BQKA, key_BQKA, self._heads(self.value(hidden_BQE)))
        hidden_BQE = self.attention_norm(hidden_BQE + self.attention_out(_joined(read_BQKA)))

        look_BKQN = self._look(hidden_BQE + position_BQE, points)
        map_BNKA = self._heads(masked(self.map(tokens_BNE), context.valid_BN))
        seen_BQKA = jnp.einsum("BKQN,BNKA->BQKA", look_BKQN.astype(map_BNKA.dtype), map_BNKA)
        hidden_BQE = self.look_norm(hidden_BQE + self.look_out(_joined(seen_BQKA)))

        hidden_BQE = self.ff_norm(hidden_BQE + self.ff_out(ACTIVATIONS["relu"](self.ff_in(hidden_BQE))))
        return hidden_BQE, look_BKQN.mean(1) if context.assign else None

    def _look(self, placed_BQE: jax.Array, points: jax.Array) -> jax.Array:
        """float32 BKQN: the weight of every token in what each head of each query reads."""
        (B, Q, _), (H, W), K = placed_BQE.shape, self.grid_HW, self.heads
        # float32: a bfloat16 reference point in the middle of 24 tokens is off by 1/20 of a token.
        points, offsets = points.astype(jnp.float32), self.offsets(placed_BQE).astype(jnp.float32)
        offsets = offsets.reshape(B, Q, K, -1, 2)
        logits_BQKM = self.weights(placed_BQE).astype(jnp.float32).reshape(B, Q, K, -1)
        column_BQKMW = _bilinear(points[:, None, None, 0] * W + offsets[..., 0] - 0.5, W)
        row_BQKMH = _bilinear(points[:, None, None, 1] * H + offsets[..., 1] - 0.5, H)
        row_BQKMH = row_BQKMH * jax.nn.softmax(logits_BQKM)[..., None]
        look_BKQHW = jnp.einsum("BQKMH,BQKMW->BKQHW", row_BQKMH, column_BQKMW)
        return look_BKQHW.reshape(B, K, Q, H * W)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)


def _joined(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


def _bilinear(place: jax.Array, num: int) -> jax.Array:
    """[..., num]: the shares of cells 0 ... num - 1 in a value between them; 0.25 gives 0.75, 0.25, 0 and so on.

    Written with floor and not as max(0, 1 - distance), whose derivative vanishes at whole places: there too the
    derivative is torch's, towards the next cell.
    """
    place = place[..., None]
    below = jnp.floor(place)
    part, cell = place - below, jnp.arange(num, dtype=place.dtype)
    return jnp.where(cell == below, 1 - part, 0) + jnp.where(cell == below + 1, part, 0)


def _somewhere(assign_BQN: jax.Array, valid_BN: jax.Array | None) -> jax.Array:
    """With equal shares for a query that looks at no valid token at all."""
    if valid_BN is not None:
        assign_BQN = jnp.where(valid_BN[:, None], assign_BQN, 0)
    return jnp.where(assign_BQN.sum(-1, keepdims=True) > 0, assign_BQN, 1)


def _uniform(grid_HW: tuple[int, int], pooled: tuple[int, int]) -> np.ndarray:
    """float32 [h * w, 2], (x, y) in 0 ... 1, row by row: evenly from the first token's centre to the last one's."""
    y, x = (np.linspace(0.5, size - 0.5, num) / size for size, num in zip(grid_HW, pooled, strict=True))
    return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=-1).astype(np.float32)


def _ring(heads: int, points: int) -> np.ndarray:
    """float32 [heads * points * 2]: Deformable DETR's first offsets, on a square around the reference point."""
    angle = 2 * np.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    return (direction[:, None] * np.arange(1, points + 1)[:, None]).astype(np.float32).reshape(-1)
