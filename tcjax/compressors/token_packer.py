"""TokenPacker: every cell of the grid becomes one token, read from several layers of the tower by one attention.

    q = LN(W_q x0)        x0 = the cell's token after bilinear downsampling of the tower's last features
    k = LN(W_2 gelu(W_1 l)), v = LN(W_4 gelu(W_3 l))        l = the cell's tokens in the earlier layers, side by side
    y = W_6 gelu(W_5 MHA(q, k, v))        each query attends to its own cell only; no residual, so x0 only steers

Source: Li et al. 2024, "TokenPacker: Efficient Visual Projector for Multimodal LLM" (CircleRadon/TokenPacker): CLIP's
hidden states 12, 16, 22 and 23, cells of s x s, heads 128 wide, LayerNorm eps 1e-6, linear layers from N(0, 0.02), the
attention's in_proj as torch starts it. No weight depends on the cells: one checkpoint serves s = 2, 3 and 4.
Bilinear is torch's without antialiasing: the mean of 2 x 2 for s = 2, the centre alone for s = 3, the mean of the
central 2 x 2 for s = 4; so every token it reads lies in the cell.
Departures: any grid, and cells that are not square, as long as they are equal. With padding a cell's attention reads
its valid tokens only, x0 is the bilinear mean over those of its tokens that are valid (of all the cell's valid tokens
where it has none), and a cell without a valid token is an invalid output.
Cost: 2 N (levels C^2 + C^2) + 2 Q C^2 + 2 N C^2 + Q (C D + D^2) multiplications per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
    Widths,
    check_grid,
    handed_over,
    one_image,
    read_levels,
    visible,
)
from tcjax.compressors.queries import GridConfig, refuse_queries
from tcjax.interop.lines import attention, linear, mlp, norm
from tcjax.interop.names import Name
from tcjax.nn.cells import cells, from_cells
from tcjax.nn.dense import dense, small_normal
from tcjax.nn.mha import MultiheadAttention
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm
from tcjax.nn.positions import bilinear_matrix

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """num_queries: h * w cells, where h and w divide the sides of the grid.

    shape: (h, w); None takes the cells nearest to squares (24 x 24 into 144: 2 x 2). head_width: A, C = K * A.
    levels: the tower's layers that are read, each by the number of blocks behind it; CLIP-L's are the published ones.
    """

    num_queries: int = 144
    head_width: int = 128
    levels: tuple[int, ...] = (12, 16, 22, 23)
    needs = ("levels",)
    elastic = "pooling"

    def outputs(self, widths: Widths) -> int:
        height, width = self.out_grid(widths)
        if self.head_width < 1 or widths.vision_C % self.head_width:
            raise ValueError(f"head_width={self.head_width} must divide the tower's width C={widths.vision_C}.")
        return height * width

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        """The cells (h, w)."""
        H, W = one_image(widths)
        possible = [(h, w) for h in range(1, H + 1) for w in range(1, W + 1) if H % h == W % w == 0]
        found = [(h, w) for h, w in possible if h * w == self.num_queries and self.shape in (None, (h, w))]
        if not found and self.shape is None:
            raise refuse_queries(self.num_queries, widths, "a cut into equal cells", [h * w for h, w in possible])
        if not found:
            raise ValueError(
                f"shape={self.shape} is no cut of a {H}x{W} grid into num_queries={self.num_queries} equal cells; "
                f"possible: {[(h, w) for h, w in possible if h * w == self.num_queries] or possible}."
            )
        return min(found, key=lambda shape: abs(math.log(H * shape[1] / (W * shape[0]))))

    def build(self, widths: Widths, rngs: nnx.Rngs) -> TokenPacker:
        return TokenPacker(self, widths, rngs=rngs)

    def of_tower(self) -> dict[str, Any]:
        return {"levels": self.levels}

    def semantics(self, widths: Widths) -> dict:
        return {
            "cells": list(self.out_grid(widths)),
            "cell_order": "row by row",
            "layers": list(self.levels),
            "heads": widths.vision_C // self.head_width,
            "activation": "gelu",
            "norm_eps": _EPS,
            "query": "bilinear, not antialiased",
        }

    def names(self, widths: Widths) -> list[Name]:
        """TokenPacker's mm_projector."""
        table = [*linear("query", "q_proj_1", bias=False), *attention("attention", "clip_attn")]
        for ours, theirs in {"key": "k_proj_1", "value": "v_proj_1", "mlp": "mlp"}.items():
            table += mlp(ours, f"{theirs}.", 2)
        for ours, theirs in {"norm_query": "ln_q_1", "norm_key": "ln_k_1", "norm_value": "ln_v_1"}.items():
            table += norm(ours, theirs)
        return table


class TokenPacker(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs, self.cells = widths, config.outputs(widths), config.out_grid(widths)
        check_levels(config.levels, widths)
        C, D, E = widths.vision_C, widths.llm_D, widths.levels * widths.vision_C
        self.query = dense("CE", C, C, bias=False, init=small_normal, rngs=rngs)
        self.key = Mlp("EIC", (E, C, C), init=small_normal, rngs=rngs)
        self.value = Mlp("EIC", (E, C, C), init=small_normal, rngs=rngs)
        self.norm_query = LayerNorm("C", C, eps=_EPS)
        self.norm_key = LayerNorm("C", C, eps=_EPS)
        self.norm_value = LayerNorm("C", C, eps=_EPS)
        self.attention = MultiheadAttention(C, C // config.head_width, out_init=small_normal, rngs=rngs)
        self.mlp = Mlp("CFD", (C, D, D), init=small_normal, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        tokens_BNC, grid_HW = visible(tokens_BNC, context), self.widths.grid_HW
        levels_BNE = read_levels(tokens_BNC, context, self.widths.levels)
        valid_BQM = None if context.valid_BN is None else cells(context.valid_BN, grid_HW, self.cells)
        query_BQC = self.norm_query(self.query(self._downsampled(tokens_BNC, valid_BQM)))
        key_BQMC = cells(self.norm_key(self.key(levels_BNE)), grid_HW, self.cells)
        value_BQMC = cells(self.norm_value(self.value(levels_BNE)), grid_HW, self.cells)
        read_BQC, weights_BQM = attend_in_cells(
            self.attention, query_BQC, key_BQMC, value_BQMC, valid_BQM, weights=context.assign
        )
        valid_BQ = None if valid_BQM is None else valid_BQM.any(-1)
        assign_BQN = None if weights_BQM is None else from_cells(weights_BQM, grid_HW, self.cells)
        return handed_over(self.mlp(read_BQC), valid_BQ, assign_BQN, context)

    def _downsampled(self, tokens_BNC: jax.Array, valid_BQM: jax.Array | None) -> jax.Array:
        """x0 of every cell, BQC, in float32 as published and then in the tokens' own type."""
        tokens_BQMC = cells(tokens_BNC.astype(jnp.float32), self.widths.grid_HW, self.cells)
        (H, W), (height, width) = self.widths.grid_HW, self.cells
        # Every cell has the same weights: those of the first one.
        row, column = (bilinear_matrix(*sides)[0, : sides[0] // sides[1]] for sides in ((H, height), (W, width)))
        taps_M = np.kron(row, column)
        if valid_BQM is None:
            mean_BQC = jnp.einsum("M,BQMC->BQC", taps_M, tokens_BQMC)
        else:
            share_BQM = taps_M * valid_BQM
            share_BQM = jnp.where(share_BQM.any(-1, keepdims=True), share_BQM, valid_BQM)
            share_BQM /= jnp.maximum(share_BQM.sum(-1, keepdims=True), 1e-3)  # bilinear weights are 1/4 or more
            mean_BQC = jnp.einsum("BQM,BQMC->BQC", share_BQM, tokens_BQMC)
        return mean_BQC.astype(tokens_BNC.dtype)


def check_levels(levels: tuple[int, ...], widths: Widths) -> None:
    """ValueError unless the tower hands over as many earlier layers as the compressor names, and at least one."""
    if not levels or widths.levels != len(levels):
        raise ValueError(
            f"levels={levels} names {len(levels)} earlier layers of the tower, at least 1 is needed, and this tower "
            f"hands over {widths.levels}; Widths.levels and VitConfig.levels must be those of `Config.of_tower()`."
        )


def attend_in_cells(
    attention: MultiheadAttention,
    query_BQC: jax.Array,
    key_BQMC: jax.Array,
    value_BQMC: jax.Array,
    valid_BQM: jax.Array | None,
    *,
    weights: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """What every query reads from the valid tokens of its own cell, BQC, and if `weights` how much of each, BQM."""
    B, Q, M, C = key_BQMC.shape
    mask_BSM = None
    if valid_BQM is not None:
        mask_BSM = (valid_BQM | ~valid_BQM.any(-1, keepdims=True)).reshape(B * Q, 1, M)
    read_BSC, weights_BSM = attention(  # a cell is a row of its own with S = 1 query
        query_BQC.reshape(B * Q, 1, C),
        key_BQMC.reshape(B * Q, M, C),
        value_BQMC.reshape(B * Q, M, C),
        mask_BSM=mask_BSM,
        weights=weights,
    )
    return read_BSC.reshape(B, Q, C), None if weights_BSM is None else weights_BSM.reshape(B, Q, M)
