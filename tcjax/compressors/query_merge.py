"""Query merge: every token goes to Q learned slots in shares, and counts in them as much as it matters to the question.

    r_n = (W_k LN(x_n)) . (W_q LN(t)) / sqrt(A)         relevance: t is the instruction's mean embedding
    a_qn = softmax over the slots q of (s_q . W_s LN(x_n) / sqrt(A))      whose token it is
    y_q = sum_n w_qn x_n,   w_qn = a_qn exp(r_n) / sum_m a_qm exp(r_m)    the relevance-weighted mean of a slot's tokens
    out = W gelu(W y)

exp(r_n) / sum exp(r_m) is the softmax relevance of the tokens; a slot's own normalisation cancels its sum. Without
relevance (r = 0) this is its own text-free control, exactly: for the null text (a row whose text_valid_BT is all False),
and for every text at first, since W_q starts at 0. Slots compete for tokens, so a token that matters little still goes
somewhere, and the question decides how a slot weighs what it got. Padding is in no slot.

What is not ours: the first two of three lines of a sketch, relevance = tokens @ query, weights = softmax(relevance);
the third, compression_net(tokens, weights, query), it leaves open. literal=True takes those two as they stand, with raw
tokens, undivided: r_n = x_n . t, and W t where the text's width is not C, without which the product does not exist. All
else is ours: the learned shared space, the slots, what they do with the weights. The net itself does not read the query:
the LLM does.
Slots start from N(0, 1). Cost: N C 2 A + N Q A + Q N C + Q (C D + D^2) multiplications per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
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
from tcjax.nn.dense import dense
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm
from tcjax.nn.pool import masked_mean

_EPS = 1e-5
_HIDDEN = -1e30


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """inner: width A of the two spaces, of relevance and of slots. literal: the sketch's own relevance."""

    num_queries: int = 64
    inner: int = 256
    literal: bool = False
    needs = ("text",)

    def build(self, widths: Widths, rngs: nnx.Rngs) -> QueryMerge:
        return QueryMerge(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "any_num_tokens": True,
            "max_queries": self.weighted(),
            "inner": self.inner,
            "literal": self.literal,
            "activation": "gelu",
            "norm_eps": _EPS,
        }

    def names(self, widths: Widths) -> list[Name]:
        """Ours: nobody published such a module."""
        table = [Name("slots", "slots"), *norm("norm", "norm"), *linear("slot_key", "slot_key", bias=False)]
        table += [*linear("out/linears/0", "out.0"), *linear("out/linears/1", "out.2")]
        if not self.literal:
            table += norm("relevance/norm", "relevance.norm")
            return table + [line for name in ("key", "query") for line in _bare(name)]
        return table + (_bare("query") if widths.text_D != widths.vision_C else [])


class QueryMerge(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.inner < 1:
            raise ValueError(f"inner={config.inner}: must be at least 1.")
        if widths.text_D < 1:
            raise ValueError(f"query_merge weighs tokens by the instruction, but Widths.text_D={widths.text_D}.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        C, D, A = widths.vision_C, widths.llm_D, config.inner
        self.norm = LayerNorm("C", C, eps=_EPS)
        relevance = _LiteralRelevance if config.literal else _Relevance
        self.relevance = relevance(C, widths.text_D, A, rngs=rngs)
        most = config.weighted()
        self.slots = nnx.Param(rngs.params.normal((most, A)), axes="QA")
        self.slot_key = dense("CA", C, A, bias=False, rngs=rngs)
        self.out = Mlp("CFD", (C, D, D), rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_width(tokens_BNC, self.widths)
        tokens_BNC, Q = visible(tokens_BNC, context), self.num_outputs
        # float32: 8 significant bits would blur weights that sum to 1 over hundreds of tokens.
        wide_BNC = tokens_BNC.astype(jnp.float32)
        normed_BNC = self.norm(wide_BNC)
        text_BTD, text_valid_BT = read_text(context, self.widths)
        text_BD = masked_mean(text_BTD.astype(jnp.float32), text_valid_BT)
        relevance_BN = self.relevance(wide_BNC, normed_BNC, text_BD)
        relevance_BN = jnp.where(text_valid_BT.any(-1, keepdims=True), relevance_BN, 0)
        if context.valid_BN is not None:
            relevance_BN = jnp.where(context.valid_BN, relevance_BN, _HIDDEN)
        key_BNA, slots_QA = self.slot_key(normed_BNC), self.slots[...][:Q].astype(jnp.float32)
        logits_BQN = jnp.einsum("QA,BNA->BQN", slots_QA, key_BNA) * key_BNA.shape[-1] ** -0.5
        if context.active_B is not None:
            logits_BQN = jnp.where((jnp.arange(Q) < context.active_B[:, None])[..., None], logits_BQN, _HIDDEN)
        # Shares over the slots times relevance, in logarithms: a slot that hardly gets anything still has a mean.
        weights_BQN = jax.nn.softmax(jax.nn.log_softmax(logits_BQN, axis=1) + relevance_BN[:, None])
        merged_BQC = jnp.einsum("BQN,BNC->BQC", weights_BQN, wide_BNC).astype(tokens_BNC.dtype)
        assign_BQN = weights_BQN if context.assign else None
        return handed_over(self.out(merged_BQC), any_valid(tokens_BNC, context, Q), assign_BQN, context)


class _Relevance(nnx.Module):
    """Tokens and the instruction in a shared learned space."""

    def __init__(self, C: int, D: int, A: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm("D", D, eps=_EPS)
        self.key = dense("CA", C, A, bias=False, rngs=rngs)  # the softmax over tokens cancels a bias
        self.query = dense("DA", D, A, bias=False, init=initializers.zeros, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, normed_BNC: jax.Array, text_BD: jax.Array) -> jax.Array:
        key_BNA, query_BA = self.key(normed_BNC), self.query(self.norm(text_BD))
        return jnp.einsum("BNA,BA->BN", key_BNA, query_BA) * key_BNA.shape[-1] ** -0.5


class _LiteralRelevance(nnx.Module):
    """The plain product of tokens and text; a matrix only where their widths differ."""

    def __init__(self, C: int, D: int, A: int, *, rngs: nnx.Rngs):
        self.query = dense("DC", D, C, bias=False, rngs=rngs) if C != D else None

    def __call__(self, tokens_BNC: jax.Array, normed_BNC: jax.Array, text_BD: jax.Array) -> jax.Array:
        query_BC = text_BD if self.query is None else self.query(text_BD)
        return jnp.einsum("BNC,BC->BN", tokens_BNC, query_BC)


def _bare(name: str) -> list[Name]:
    return linear(f"relevance/{name}", f"relevance.{name}", bias=False)
