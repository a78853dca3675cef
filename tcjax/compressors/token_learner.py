"""TokenLearner: a small MLP on each token draws Q maps over the image, and each map takes its mean of the tokens.

    m = W_2 gelu(W_1 LN(x) + b)               tanh GELU, hidden width 64
    y_q = sum_n softmax_n(m_nq) x_n,  out = W gelu(W y)

The control of learned_merge: the same projection, but every output reads every token, softly; nothing is selected.

Source: Ryoo et al. 2021, "TokenLearner", version 1.1 of google-research/scenic (projects/token_learner, which finds it
better than the paper's convolutions): LayerNorm eps 1e-6, kernels Xavier-uniform, bias N(0, 1e-6).
Departures: no bias behind W_2, which the softmax over the image cancels; the projection to the LLM's width is ours;
padding is masked out of the maps. No dropout. Cost: N C F + N F Q + Q N C + Q (C D + D^2) multiplications per image.
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
    CompressorConfig,
    Context,
    Widths,
    any_valid,
    check_width,
    handed_over,
    visible,
)
from tcjax.interop.lines import linear, norm
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.dense import dense
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm

_EPS, _ACTIVATION = 1e-6, "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: maps Q. hidden: width F of the MLP that draws them."""

    num_queries: int = 64
    hidden: int = 64

    def outputs(self, widths: Widths) -> int:
        if self.num_queries < 1:
            raise ValueError(f"num_queries={self.num_queries}: must be any whole number from 1 up.")
        return self.num_queries

    def build(self, widths: Widths, rngs: nnx.Rngs) -> TokenLearner:
        return TokenLearner(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "any_num_tokens": True,
            "hidden": self.hidden,
            "activation": _ACTIVATION,
            "out_activation": "gelu",
            "norm_eps": _EPS,
        }

    def names(self, widths: Widths) -> list[Name]:
        """Scenic's parameters, spelled as PyTorch spells them; `out` is ours."""
        table = [*norm("norm", "LayerNorm_0"), *linear("hidden", "token_masking.Dense_0")]
        table += linear("maps", "token_masking.Dense_1", bias=False)
        return [*table, *linear("out/linears/0", "out.0"), *linear("out/linears/1", "out.2")]


class TokenLearner(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.hidden < 1:
            raise ValueError(f"hidden={config.hidden}: must be at least 1.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        C, D, F = widths.vision_C, widths.llm_D, config.hidden
        self.norm = LayerNorm("C", C, eps=_EPS)
        self.hidden = dense("CF", C, F, init=initializers.xavier_uniform(), rngs=rngs)
        assert self.hidden.bias is not None
        self.hidden.bias.set_value(1e-6 * rngs.params.normal((F,)))
        self.maps = dense("FQ", F, self.num_outputs, bias=False, init=initializers.xavier_uniform(), rngs=rngs)
        self.out = Mlp("CFD", (C, D, D), rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_width(tokens_BNC, self.widths)
        tokens_BNC = visible(tokens_BNC, context)
        maps_BNQ = self.maps(ACTIVATIONS[_ACTIVATION](self.hidden(self.norm(tokens_BNC)))).astype(jnp.float32)
        if context.valid_BN is not None:
            maps_BNQ = jnp.where(context.valid_BN[..., None], maps_BNQ, -1e30)
        weights_BNQ = jax.nn.softmax(maps_BNQ, axis=1)
        # float32: shares rounded to 8 significant bits no longer sum to 1.
        merged_BQC = jnp.einsum("BNQ,BNC->BQC", weights_BNQ, tokens_BNC.astype(jnp.float32)).astype(tokens_BNC.dtype)
        assign_BQN = weights_BNQ.swapaxes(1, 2) if context.assign else None
        valid_BQ = any_valid(tokens_BNC, context, self.num_outputs)
        return handed_over(self.out(merged_BQC), valid_BQ, assign_BQN, context)
