"""Matryoshka query transformer (MQT-LLaVA): any first m of 256 queries, each a pooling of the image tokens.

    Q = LN_q(queries + P)        K = LN_k(P resized to the grid)        V = LN_v(x)
    y = MHA(Q, K, V) W_proj      W_proj: C -> D raw, no bias; no residual, no feed-forward, no norm behind

P: the sin-cos table of the sqrt(M) grid (tcjax.nn.positions) rounded to half precision, resized bicubically for K.
The published keys hold no image: every image is pooled with the same learned weights. With `key_content` they are
LN_k(x + P), the variant the paper's text suggests; it is ours.

Source: Hu et al. 2024, "Matryoshka Query Transformer for Large Vision-Language Models", as gordonhu608/MQT-LLaVA builds
it: width C, heads of 64, LayerNorm eps 1e-6, queries and the attention's W_o N(0, 0.02^2), W_proj N(0, 1/D).
M = max_queries always have weights and the first num_queries are used: outputs do not see each other. Its second stage
draws m for every batch: wrap it in `elastic` with `drawn_from`.
Departures: any grid, not only 24 x 24. Padding is masked out of the keys.
Cost: (2 N + 2 Q) C^2 + 2 Q N C + Q C D multiplications, N C^2 of it for keys that are always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
    Widths,
    any_valid,
    check_grid,
    handed_over,
    one_image,
    visible,
)
from tcjax.compressors.queries import PrefixConfig
from tcjax.interop.lines import attention, fixed, norm
from tcjax.interop.names import Name
from tcjax.nn.attention import padding_mask
from tcjax.nn.dense import rows, small_normal
from tcjax.nn.mha import MultiheadAttention, num_heads
from tcjax.nn.norm import LayerNorm
from tcjax.nn.positions import resize_matrix, sincos_2d, square_side

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """MQT's sizes. max_queries: queries with weights (M), a square. head_width: A, there are C / A heads.

    key_content: keys hold the image too.
    """

    num_queries: int = 256
    max_queries: int = 256
    head_width: int = 64
    key_content: bool = False
    elastic = "prefix"

    @property
    def drawn_from(self) -> tuple[int, ...]:
        """The numbers that the published training draws from uniformly, for `elastic`: 2, 4, ... M."""
        return tuple(range(2, self.max_queries + 1, 2)) or (1,)

    def outputs(self, widths: Widths) -> int:
        self.side()
        return super().outputs(widths)

    def side(self) -> int:
        return square_side(self.max_queries, "matryoshka_query")

    def build(self, widths: Widths, rngs: nnx.Rngs) -> MatryoshkaQuery:
        return MatryoshkaQuery(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "max_queries": self.max_queries,
            "heads": num_heads(widths.vision_C, self.head_width),
            "norm_eps": _EPS,
            "key_content": self.key_content,
        }

    def names(self, widths: Widths) -> list[Name]:
        """MQT-LLaVA's query_abstractor."""
        table = [Name("query", "query"), *fixed("pos_embed", _table(self.side(), widths.vision_C))]
        for name in ("ln_q", "ln_k", "ln_v"):
            table += norm(name, name)
        return [*table, *attention("attn", "attn"), Name("proj", "proj")]  # used as x @ proj, so not transposed


class MatryoshkaQuery(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        one_image(widths)
        self.widths, self.num_outputs, self.side = widths, config.outputs(widths), config.side()
        self.key_content = config.key_content
        C, D = widths.vision_C, widths.llm_D
        sincos_2d((1, 1), C)  # a width it refuses is better refused here
        self.query = nnx.Param(small_normal(rngs.params(), (config.max_queries, C)), axes="QC")
        self.attn = MultiheadAttention(C, num_heads(C, config.head_width), out_init=small_normal, rngs=rngs)
        self.ln_q, self.ln_k, self.ln_v = (LayerNorm("C", C, eps=_EPS) for _ in range(3))
        self.proj = nnx.Param(D**-0.5 * rngs.params.normal((C, D)), axes="CD")

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        tokens_BNC, Q = visible(tokens_BNC, context), self.num_outputs
        square_QC = _table(self.side, tokens_BNC.shape[-1]).astype(np.float32)
        on_key_NC = resize_matrix((self.side, self.side), self.widths.grid_HW) @ square_QC
        query_QC = self.query[...][:Q]
        dtype = jnp.result_type(tokens_BNC, query_QC)
        query_BQC = (query_QC + square_QC[:Q].astype(query_QC.dtype))[None]
        key_BNC = jnp.asarray(on_key_NC, dtype)[None]  # one for the whole batch
        if self.key_content:
            key_BNC = key_BNC + tokens_BNC
        read_BQC, assign_BQN = self.attn(
            self.ln_q(query_BQC.astype(dtype)),
            self.ln_k(key_BNC),
            self.ln_v(tokens_BNC.astype(dtype)),
            mask_BSM=padding_mask(context.valid_BN),
            weights=context.assign,
        )
        return handed_over(rows(read_BQC, self.proj[...]), any_valid(tokens_BNC, context, Q), assign_BQN, context)


def _table(side: int, width: int) -> np.ndarray:
    """float16 [M, width], as the checkpoints hold it."""
    return sincos_2d((side, side), width).astype(np.float16)
