"""QueCC: every cell of the grid becomes one token, and the question steers what is read from it.

    t = LN(W_t text)                                      one vector of the question, added to every visual token
    q = conv_s(MLP_q(x + t)), k = MLP_k(l), v = MLP_v(l)  MLP = LN(W_2 gelu(W_1 .)), conv_s depthwise, s x s, stride s
    y = W_4 gelu(W_3 MHA(q, k, v))                        each query attends to its own s x s cell only; no residual

Source: Li et al. 2024, "Inference Optimal VLMs Need Only One Visual Token but Larger Models", as
locuslab/llava-token-compression builds it before LLaVA-1.5's projector: l = TokenPacker's four hidden states of CLIP
side by side, 8 heads, LayerNorm eps 1e-6, all weights as torch starts them, at most 36 tokens. The convolution has one
kernel per s: Q belongs to the training.
Departures: the published text vector is the LLM's last state at the last token of the prompt. Here it is made from the
instruction's embeddings: their mean, or the last one ("last", the published position) without the LLM's pass. No
instruction adds nothing: t = 0. Any grid that s divides. Biases start at 0. With padding a cell's attention reads its
valid tokens only, the convolution reads 0 for the others, and a cell without a valid token is an invalid output.
Cost: 2 N (levels + 1) C^2 + 4 N C^2 + N C + 2 Q C^2 + Q (C D + D^2) multiplications per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    CompressorConfig,
    Context,
    Widths,
    check_grid,
    handed_over,
    masked,
    read_levels,
    read_text,
    visible,
)
from tcjax.compressors.queries import merge_factor
from tcjax.compressors.token_packer import attend_in_cells, check_levels
from tcjax.interop.lines import attention, conv, linear, mlp, norm
from tcjax.interop.names import Name
from tcjax.nn.cells import cells, from_cells
from tcjax.nn.conv import Conv
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.mha import MultiheadAttention
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm

TextPool = Literal["mean", "last"]
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: N / s^2, where s divides both sides of the grid. heads: K, which divides C.

    text_pool: the instruction's one vector, the mean of its valid embeddings or the last one.
    levels: the tower's layers that are read, each by the number of blocks behind it; CLIP-L's are the published ones.
    """

    num_queries: int = 36
    heads: int = 8
    text_pool: TextPool = "mean"
    levels: tuple[int, ...] = (12, 16, 22, 23)
    needs = ("text", "levels")

    def outputs(self, widths: Widths) -> int:
        if self.heads < 1 or widths.vision_C % self.heads:
            raise ValueError(f"heads={self.heads} must divide the tower's width C={widths.vision_C}.")
        return widths.num_tokens // self.factor(widths) ** 2

    def factor(self, widths: Widths) -> int:
        """s on this grid."""
        return merge_factor(self.num_queries, widths, "a cut into s x s cells")

    def build(self, widths: Widths, rngs: nnx.Rngs) -> QueCC:
        return QueCC(self, widths, rngs=rngs)

    def of_tower(self) -> dict[str, Any]:
        return {"levels": self.levels}

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        (H, W), s = widths.grid_HW, self.factor(widths)
        return H // s, W // s

    def semantics(self, widths: Widths) -> dict:
        return {
            "factor": self.factor(widths),
            "cell_order": "row by row",
            "layers": list(self.levels),
            "heads": self.heads,
            "text_pool": self.text_pool,
            "activation": "gelu",
            "norm_eps": _EPS,
        }

    def names(self, widths: Widths) -> list[Name]:
        """llava-token-compression's mm_projector: the module, then LLaVA's linear layers."""
        table = [*conv("downsample", "0.q_downsample"), *attention("attention", "0.clip_attn")]
        for ours, theirs in {"query": "0.q_proj", "key": "0.k_proj", "value": "0.v_proj"}.items():
            table += [*mlp(f"{ours}/mlp", f"{theirs}.", 2), *norm(f"{ours}/norm", f"{theirs}.3")]
        table += [*linear("text", "0.text_projection.0"), *norm("norm_text", "0.text_projection.1")]
        return [*table, *linear("mlp/linears/0", "1"), *linear("mlp/linears/1", "3")]


class QueCC(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.text_pool not in get_args(TextPool):
            raise ValueError(
                f"text_pool={config.text_pool!r} is no pooling of quecc; possible: {list(get_args(TextPool))}."
            )
        self.widths, self.num_outputs, self.cells = widths, config.outputs(widths), config.out_grid(widths)
        check_levels(config.levels, widths)
        C, D, E, s = widths.vision_C, widths.llm_D, widths.levels * widths.vision_C, config.factor(widths)
        self.text_pool = config.text_pool
        self.text = dense("IC", widths.text_D, C, init=torch_uniform, rngs=rngs)
        self.norm_text = LayerNorm("C", C, eps=_EPS)
        self.query = _Projection("CIC", C, C, rngs=rngs)
        self.downsample = Conv("C", C, C, kernel=s, stride=s, groups=C, init=torch_uniform, rngs=rngs)
        self.key = _Projection("EIC", E, C, rngs=rngs)
        self.value = _Projection("EIC", E, C, rngs=rngs)
        self.attention = MultiheadAttention(C, config.heads, rngs=rngs)
        self.mlp = Mlp("CFD", (C, D, D), rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        (H, W), C = self.widths.grid_HW, self.widths.vision_C
        tokens_BNC = visible(tokens_BNC, context)
        levels_BNE = read_levels(tokens_BNC, context, self.widths.levels)
        asked_BNC = tokens_BNC + self._asked(context)[:, None]
        full_BNC = masked(self.query(asked_BNC), context.valid_BN)
        query_BQC = self.downsample(full_BNC.reshape(-1, H, W, C)).reshape(-1, self.num_outputs, C)
        key_BQMC = cells(self.key(levels_BNE), (H, W), self.cells)
        value_BQMC = cells(self.value(levels_BNE), (H, W), self.cells)
        valid_BQM = None if context.valid_BN is None else cells(context.valid_BN, (H, W), self.cells)
        read_BQC, weights_BQM = attend_in_cells(
            self.attention, query_BQC, key_BQMC, value_BQMC, valid_BQM, weights=context.assign
        )
        valid_BQ = None if valid_BQM is None else valid_BQM.any(-1)
        assign_BQN = None if weights_BQM is None else from_cells(weights_BQM, (H, W), self.cells)
        return handed_over(self.mlp(read_BQC), valid_BQ, assign_BQN, context)

    def _asked(self, context: Context) -> jax.Array:
        """What the question adds to every visual token, BC; 0 for the null text."""
        text_BTD, valid_BT = read_text(context, self.widths)
        weights_BT = valid_BT.astype(jnp.float32)
        if self.text_pool == "last":
            weights_BT *= jnp.cumsum(weights_BT, axis=1) == weights_BT.sum(1, keepdims=True)
        weights_BT /= jnp.maximum(weights_BT.sum(1, keepdims=True), 1)
        vector_BD = jnp.einsum("BT,BTD->BD", weights_BT, text_BTD.astype(jnp.float32)).astype(text_BTD.dtype)
        return masked(self.norm_text(self.text(vector_BD)), valid_BT.any(1))


class _Projection(nnx.Module):
    """LN(W_2 gelu(W_1 x))."""

    def __init__(self, axes: str, wide: int, narrow: int, *, rngs: nnx.Rngs):
        self.mlp = Mlp(axes, (wide, narrow, narrow), rngs=rngs)
        self.norm = LayerNorm(axes[-1], narrow, eps=_EPS)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.mlp(x))
