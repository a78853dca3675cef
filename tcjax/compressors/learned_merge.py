"""Learned merge: an importance network picks Q of the N tokens, a merger network adds what the others say.

    s_n = w . gelu(W_l u_n + W_g mean(u) + b),  u = gelu(W_a LN(x))      importance; both halves as in DynamicViT
          + (W_x LN(x_n)) . (W_t LN(t)) / sqrt(A)                        text: t is the instruction's mean embedding
          + beta zscore(log(prior_n))                                    prior
    p = soft_top_k(s / T)                      shares that sum to Q; the Q tokens of highest s stay, in their old order
    e = unit(W_e sg(x)),  a(n) = argmax_j e_n . e_j                     each dropped token n goes to one kept token j
    y_j = x_j + W_2 sum_n p_n h_n / (1 + sum_n p_n),  h_n = gelu(W_k x_j + W_d x_n + b)      over the n that go to j
    out = W gelu(W y)

Every step is over all tokens at once and no order of tokens matters. Gradients: a kept score through the gate
y_j (1 + p_j - sg(p_j)), whose value is y_j; a dropped one through its weight p_n; all of them through sum p = Q; the
metric W_e straight through the softmax of e . e / 0.1. Features are not disturbed by the metric (sg). W_2 starts at 0:
at first this is plain pruning. w and W_t start near 0: at first the prior decides, or nothing.
In training the scores get Gumbel noise, and T falls from 1 to 0.1 and the noise from 1 to 0 over the first half
(`Context.keys_B`, `Context.progress`); without keys nothing is random. Equal scores: the earlier token is kept; equal
similarities: the earlier kept token takes it. Fewer valid tokens than Q: the surplus outputs, at the end, are invalid.
`Context.active_B` gives exactly the tokens of the config at fewer, first in the row.

literal=True is the sketch this grew from: s = sigmoid(W gelu(W x)), keep the Q highest, then each dropped token, one
after another, finds the most similar kept token by cosine and overwrites it by W gelu(W [kept; dropped]). Kept for
comparison only. Its importance network never learns (scores only choose, they multiply nothing), its result depends on
the order of the tokens, overwriting shrinks norms, and its N steps are sequential.

Sources: the soft top-k of VisionSelector; local and global halves and Gumbel noise as in DynamicViT (2021);
the decoupled metric of DTEM (2024). Ours, with no published counterpart: the residual order-free merge, W (C -> D), the
hidden layer behind W_l and W_g. A global term added to s itself would cancel, in top-k as in sum p = Q.
Cost, E, F, A = scorer, merger, metric: N C (E + F + A) + N E^2 + N Q (A + F) + 2 Q C F + Q (C D + D^2) multiplications.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    CompressorConfig,
    Context,
    Need,
    Widths,
    check_width,
    handed_over,
    read_text,
    visible,
)
from tcjax.interop.lines import linear, norm
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm
from tcjax.nn.pool import masked_mean
from tcjax.nn.top_k import slots, soft_top_k, taken, top_indices

_EPS, _TINY = 1e-5, 1e-6
_gelu = ACTIVATIONS["gelu"]


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """scorer, merger, metric: inner widths E, F, A. text, prior: what the importance is told beside the tokens.

    temperature: T at the end of the training and after it; it starts at 1. literal: the sequential sketch, whose inner
    widths are scorer and the tower's own; it knows neither text nor prior.
    """

    num_queries: int = 64
    scorer: int = 256
    merger: int = 256
    metric: int = 64
    text: bool = False
    prior: bool = False
    temperature: float = 0.1
    assign_temperature: float = 0.1
    literal: bool = False
    elastic = "pooling"

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        told: dict[Need, bool] = {"text": self.text, "prior": self.prior}
        return tuple(need for need, wanted in told.items() if wanted)

    def outputs(self, widths: Widths) -> int:
        if not 1 <= self.num_queries <= widths.num_tokens:
            height, width = widths.grid_HW
            raise ValueError(
                f"num_queries={self.num_queries}: of the N={widths.num_tokens} tokens ({widths.frames} x {height}x{width} "
                f"grid) any number from 1 to {widths.num_tokens} can be kept."
            )
        return self.num_queries

    def build(self, widths: Widths, rngs: nnx.Rngs) -> LearnedMerge:
        return LearnedMerge(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        return replace(self, num_queries=num_queries)

    def semantics(self, widths: Widths) -> dict:
        facts = {"any_num_tokens": True, "literal": self.literal, "scorer": self.scorer, "activation": "gelu"}
        if self.literal:
            return facts
        return facts | {
            "merger": self.merger,
            "metric": self.metric,
            "text": self.text,
            "prior": self.prior,
            "temperature": self.temperature,
            "assign_temperature": self.assign_temperature,
            "norm_eps": _EPS,
        }

    def names(self, widths: Widths) -> list[Name]:
        """Ours, but for importance_network and merger_network of the literal form, which are the sketch's."""
        both = {"out/linears/0": "out.0", "out/linears/1": "out.2"}
        bare: dict[str, str] = {}
        if self.literal:
            both |= {"importance/hidden": "importance_network.0", "importance/score": "importance_network.2"}
            both |= {"overwriter/linears/0": "merger_network.0", "overwriter/linears/1": "merger_network.2"}
            return _lines(both, bare)
        both |= {f"importance/{layer}": f"importance_network.{layer}" for layer in ("local", "mixed")}
        both |= {"merger/kept": "merger_network.kept"}
        bare |= {f"merger/{layer}": f"merger_network.{layer}" for layer in ("dropped", "back")}
        bare |= {"importance/overall": "importance_network.overall", "metric": "metric"}
        table = norm("importance/norm", "importance_network.norm")
        table += [Name("importance/score", "importance_network.score.weight", "unsqueeze")]
        if self.text:
            table += norm("importance/text_norm", "importance_network.text_norm")
            bare |= {f"importance/{layer}": f"importance_network.{layer}" for layer in ("token_key", "text_query")}
        if self.prior:
            table += [Name("importance/trust", "importance_network.trust")]
        return table + _lines(both, bare)


class LearnedMerge(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        for name in ("scorer", "merger", "metric"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
        for name in ("temperature", "assign_temperature"):
            if not getattr(config, name) > 0:
                raise ValueError(f"{name}={getattr(config, name)}: must be positive.")
        if config.literal and config.needs:
            raise ValueError(f"literal=True scores the tokens alone; it cannot be told {list(config.needs)} as well.")
        self.config, self.widths, self.num_outputs = config, widths, config.outputs(widths)
        C, D = widths.vision_C, widths.llm_D
        scorer = _LiteralImportance if config.literal else _Importance
        self.importance = scorer(config, widths, rngs=rngs)
        self.metric = None if config.literal else dense("CA", C, config.metric, bias=False, rngs=rngs)
        self.merger = None if config.literal else _Merger(C, config.merger, rngs=rngs)
        self.overwriter = Mlp("IEC", (2 * C, C, C), rngs=rngs) if config.literal else None
        self.out = Mlp("CFD", (C, D, D), rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_width(tokens_BNC, self.widths)
        tokens_BNC = visible(tokens_BNC, context)
        (B, N, _), Q = tokens_BNC.shape, self.num_outputs
        valid_BN = jnp.ones((B, N), bool) if context.valid_BN is None else context.valid_BN
        k_B = jnp.minimum(valid_BN.sum(-1), Q)
        if context.active_B is not None:
            k_B = jnp.minimum(k_B, context.active_B)
        # float32: with 8 significant bits, neighbours in rank would blur into ties.
        score_BN = self.importance(tokens_BNC.astype(jnp.float32), valid_BN, context)
        if self.config.literal:
            index_BQ = top_indices(score_BN, valid_BN, k_B, Q)
            merged_BQC, goes_BN, weight_BN = self._literally(tokens_BNC, valid_BN, index_BQ)
        else:
            score_BN, temperature = self._annealed(score_BN, context)
            share_BN = soft_top_k(score_BN / temperature, valid_BN, k_B)
            index_BQ = top_indices(score_BN, valid_BN, k_B, Q)
            merged_BQC, goes_BN, weight_BN = self._merged(tokens_BNC, valid_BN, index_BQ, share_BN)
        valid_BQ = assign_BQN = None
        if context.valid_BN is not None or context.active_B is not None or N < Q:
            valid_BQ = index_BQ < N
        if context.assign:
            assign_BQN = (goes_BN[:, None] == jnp.arange(Q)[:, None]) * weight_BN[:, None]
        return handed_over(self.out(merged_BQC), valid_BQ, assign_BQN, context)

    def _annealed(self, score_BN: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The scores, noisy in training, and T."""
        progress = jnp.float32(1) if context.progress is None else context.progress
        early = 1 - jnp.clip(2 * progress, 0, 1)
        if context.keys_B is not None:
            draw = jax.vmap(lambda key: jax.random.gumbel(key, score_BN.shape[1:], jnp.float32))
            score_BN = score_BN + early * draw(context.keys_B)
        return score_BN, self.config.temperature + (1 - self.config.temperature) * early

    def _merged(
        self, tokens_BNC: jax.Array, valid_BN: jax.Array, index_BQ: jax.Array, share_BN: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The kept tokens with what the others add; where each token goes, and its weight there."""
        assert self.metric is not None and self.merger is not None
        N, is_slot_BQ = tokens_BNC.shape[1], index_BQ < tokens_BNC.shape[1]
        kept_BQC, (slot_BN, is_kept_BN) = taken(tokens_BNC, index_BQ), slots(index_BQ, N)
        mass_BN = jnp.where(valid_BN & ~is_kept_BN, share_BN, 0)
        metric_BNA = self.metric(jax.lax.stop_gradient(tokens_BNC).astype(jnp.float32))
        metric_BNA = metric_BNA * jax.lax.rsqrt((metric_BNA**2).sum(-1, keepdims=True) + _TINY**2)
        alike_BNQ = jnp.einsum("BNA,BQA->BNQ", metric_BNA, taken(metric_BNA, index_BQ))
        alike_BNQ = jnp.where(is_slot_BQ[:, None], alike_BNQ / self.config.assign_temperature, -1e9)
        goes_BN, soft_BNQ = alike_BNQ.argmax(-1), jax.nn.softmax(alike_BNQ)
        goes_BNQ = jax.nn.one_hot(goes_BN, soft_BNQ.shape[-1]) + (soft_BNQ - jax.lax.stop_gradient(soft_BNQ))
        change_BQC = self.merger(tokens_BNC, kept_BQC, goes_BN, mass_BN[..., None] * goes_BNQ)
        share_BQ = taken(share_BN[..., None], index_BQ)
        gate_BQ = 1 + (share_BQ - jax.lax.stop_gradient(share_BQ))
        merged_BQC = ((kept_BQC + change_BQC) * gate_BQ).astype(change_BQC.dtype)
        return merged_BQC, jnp.where(is_kept_BN, slot_BN, goes_BN), jnp.where(is_kept_BN, 1, mass_BN)

    def _literally(
        self, tokens_BNC: jax.Array, valid_BN: jax.Array, index_BQ: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same of the sketch: one step per token, a dropped one overwrites the kept one it is most like."""
        merger = self.overwriter
        assert merger is not None
        N, Q, rows_B = tokens_BNC.shape[1], index_BQ.shape[1], jnp.arange(len(tokens_BNC))
        slot_BN, is_kept_BN = slots(index_BQ, N)
        is_dropped_BN, is_slot_BQ = valid_BN & ~is_kept_BN, index_BQ < N
        kept_BQC = taken(tokens_BNC, index_BQ).astype(jnp.result_type(tokens_BNC, merger.linears[0].kernel[...]))

        def overwrite(kept_BQC: jax.Array, token: tuple[jax.Array, jax.Array]):
            token_BC, is_dropped_B = token
            alike_BQ = jnp.where(is_slot_BQ, _cosine(jax.lax.stop_gradient((kept_BQC, token_BC))), -2)
            goes_B = alike_BQ.argmax(-1)
            pair_BI = jnp.concatenate([kept_BQC[rows_B, goes_B], token_BC], axis=-1)
            is_hit_BQ = (goes_B[:, None] == jnp.arange(Q)) & is_dropped_B[:, None]
            return jnp.where(is_hit_BQ[..., None], merger(pair_BI)[:, None], kept_BQC), goes_B

        tokens_NBC = tokens_BNC.astype(kept_BQC.dtype).swapaxes(0, 1)
        kept_BQC, goes_NB = jax.lax.scan(overwrite, kept_BQC, (tokens_NBC, is_dropped_BN.T))
        return kept_BQC, jnp.where(is_kept_BN, slot_BN, goes_NB.T), valid_BN.astype(jnp.float32)


class _Importance(nnx.Module):
    """Tokens -> scores_BN, float32."""

    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        C, D, E, A = widths.vision_C, widths.text_D, config.scorer, config.metric
        almost_zero = initializers.normal(1e-4)
        self.widths, self.text, self.prior = widths, config.text, config.prior
        self.norm = LayerNorm("C", C, eps=_EPS)
        self.local = dense("CE", C, E, rngs=rngs)
        self.mixed = dense("EE", E, E, rngs=rngs)
        self.overall = dense("EE", E, E, bias=False, rngs=rngs)
        self.score = nnx.Param(almost_zero(rngs.params(), (E,)), axes="E")
        if config.text:
            if D < 1:
                raise ValueError(f"text=True scores tokens by the instruction, but Widths.text_D={D}; name its width.")
            self.text_norm = LayerNorm("D", D, eps=_EPS)
            self.token_key = dense("CA", C, A, bias=False, rngs=rngs)
            self.text_query = dense("DA", D, A, bias=False, init=almost_zero, rngs=rngs)
        if config.prior:
            self.trust = nnx.Param(jnp.ones((1,)), axes="K")

    def __call__(self, tokens_BNC: jax.Array, valid_BN: jax.Array, context: Context) -> jax.Array:
        normed_BNC = self.norm(tokens_BNC)
        local_BNE = _gelu(self.local(normed_BNC))
        overall_BE = masked_mean(local_BNE, valid_BN)
        mixed_BNE = _gelu(self.mixed(local_BNE) + self.overall(overall_BE)[:, None])
        score_BN = jnp.einsum("BNE,E->BN", mixed_BNE, self.score[...].astype(jnp.float32))
        if self.text:
            text_BTD, text_valid_BT = read_text(context, self.widths)
            text_BD = self.text_norm(masked_mean(text_BTD.astype(jnp.float32), text_valid_BT))
            asked_BA = jnp.where(text_valid_BT.any(-1)[:, None], self.text_query(text_BD), 0)  # null text: no say
            key_BNA = self.token_key(normed_BNC)
            score_BN = score_BN + jnp.einsum("BNA,BA->BN", key_BNA, asked_BA) * key_BNA.shape[-1] ** -0.5
        if self.prior:
            score_BN = score_BN + self.trust[...] * _standard_log(_read_prior(context, valid_BN), valid_BN)
        return score_BN


class _Merger(nnx.Module):
    """The first layer of an MLP on [kept; dropped], a sum over the dropped ones, its second layer."""

    def __init__(self, C: int, F: int, *, rngs: nnx.Rngs):
        self.kept = dense("CF", C, F, rngs=rngs)
        self.dropped = dense("CF", C, F, bias=False, rngs=rngs)
        self.back = dense("FC", F, C, bias=False, init=initializers.zeros, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, kept_BQC: jax.Array, goes_BN: jax.Array, weight_BNQ: jax.Array):
        """What each kept token changes by. weight_BNQ: of token n at slot q, float32."""
        of_slot_BNF = jnp.take_along_axis(self.kept(kept_BQC), goes_BN[..., None], axis=1)
        hidden_BNF = _gelu(of_slot_BNF + self.dropped(tokens_BNC))
        sum_BQF = jnp.einsum("BNQ,BNF->BQF", weight_BNQ, hidden_BNF.astype(jnp.float32))
        mean_BQF = sum_BQF / (1 + weight_BNQ.sum(1)[..., None])
        return self.back(mean_BQF.astype(hidden_BNF.dtype))


class _LiteralImportance(nnx.Module):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        C, E = widths.vision_C, config.scorer
        self.hidden = dense("CE", C, E, init=torch_uniform, rngs=rngs)
        self.score = dense("EK", E, 1, init=torch_uniform, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, valid_BN: jax.Array, context: Context) -> jax.Array:
        return jax.nn.sigmoid(self.score(_gelu(self.hidden(tokens_BNC))))[..., 0]


def _lines(both: dict[str, str], bare: dict[str, str]) -> list[Name]:
    """Linear layers with and without bias."""
    table = [line for ours, theirs in both.items() for line in linear(ours, theirs)]
    return table + [line for ours, theirs in bare.items() for line in linear(ours, theirs, bias=False)]


def _read_prior(context: Context, valid_BN: jax.Array) -> jax.Array:
    """prior_BN with 0 where not valid; ValueError if there is none or it does not fit."""
    prior_BN = context.prior_BN
    if prior_BN is None or prior_BN.shape != valid_BN.shape:
        got = "none" if prior_BN is None else str(list(prior_BN.shape))
        raise ValueError(
            f"this compressor starts from scores of the tokens, context.prior_BN {list(valid_BN.shape)}, and got {got}; "
            f"a tower's attention can give them, and prior=False does without."
        )
    return jnp.where(valid_BN, prior_BN.astype(jnp.float32), 0)


def _standard_log(prior_BN: jax.Array, valid_BN: jax.Array) -> jax.Array:
    """log(prior) with mean 0 and variance 1 over the valid tokens."""
    log_BN1 = jnp.log(prior_BN + _TINY)[..., None]
    centred_BN1 = log_BN1 - masked_mean(log_BN1, valid_BN)[:, None]
    return (centred_BN1 * jax.lax.rsqrt(masked_mean(centred_BN1**2, valid_BN) + _TINY)[:, None])[..., 0]


def _cosine(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Of every kept token with one other, float32; norms at least 1e-8, as torch's."""
    kept_BQC, token_BC = (x.astype(jnp.float32) for x in pair)
    dot_BQ = jnp.einsum("BQC,BC->BQ", kept_BQC, token_BC)
    norms_BQ = jnp.maximum(jnp.linalg.norm(kept_BQC, axis=-1), 1e-8)
    return dot_BQ / norms_BQ / jnp.maximum(jnp.linalg.norm(token_BC, axis=-1), 1e-8)[:, None]
