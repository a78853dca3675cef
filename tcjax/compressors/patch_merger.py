"""Patch merger: every token is normed, s x s neighbours are laid side by side, and two or three linear layers follow.

    y_q = W_2 gelu(W_1 [N(x_1) ; ... ; N(x_(s^2))])                 Qwen: W_1 keeps the width s^2 C
    y_q = W_2 gelu(W_1 W_m [N(x_1) ; ... ; N(x_(s^2))])             Mistral: W_m goes back to C first

    form                    norm                    channels of the wide token    biases    source
    "qwen2_vl"              LayerNorm 1e-6          row, column, channel          yes       Wang et al. 2024, "Qwen2-VL"
    "qwen2_5_vl"            RMSNorm 1e-6            row, column, channel          yes       Bai et al. 2025, "Qwen2.5-VL"
    "qwen3_vl"              LayerNorm 1e-6          row, column, channel          yes       Qwen3-VL's main merger
    "qwen3_vl_deepstack"    the same, of the wide   row, column, channel          yes       Qwen3-VL's mergers of layers
    "mistral3"              RMSNorm 1e-5            channel, row, column          no        Mistral Small 3.1

All wide tokens have the same shape, and only the order tells Mistral's (torch's unfold) from the others. The published
modules of Qwen take tokens whose blocks were made consecutive before the tower; here, as everywhere, tokens come row by
row and so do the outputs.
Departures: linear layers start as torch's do, biases at 0. With padding, invalid tokens enter the wide one as 0, also
behind the norm, and an output is valid if any of its s^2 tokens is.
Cost: Q (16 C^2 + 4 C D) multiplications per image for Qwen at s = 2, Q (4 C^2 + C D + D^2) for Mistral.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
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
    visible,
)
from tcjax.compressors.queries import merge_factor
from tcjax.interop.lines import linear, norm
from tcjax.interop.names import Name
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm, RMSNorm
from tcjax.nn.pool import bin_shares, space_to_depth

FormName = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_deepstack", "mistral3"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One published merger. linears: keys of W_1 and W_2. merge: key of W_m, None where there is none."""

    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    norm_place: Literal["token", "wide token"] = "token"
    norm_key: str = "norm"
    channels_first: bool = False
    merge: str | None = None
    linears: tuple[str, str]
    bias: bool = True


FORMS: dict[str, Form] = {
    "qwen2_vl": Form(norm_key="ln_q", linears=("mlp.0", "mlp.2")),
    "qwen2_5_vl": Form(norm="rms", norm_key="ln_q", linears=("mlp.0", "mlp.2")),
    "qwen3_vl": Form(linears=("linear_fc1", "linear_fc2")),
    "qwen3_vl_deepstack": Form(norm_place="wide token", linears=("linear_fc1", "linear_fc2")),
    "mistral3": Form(
        norm="rms",
        norm_eps=1e-5,
        channels_first=True,
        merge="patch_merger.merging_layer",
        linears=("linear_1", "linear_2"),
        bias=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: N / s^2, where s divides both sides of the grid; all are published with s = 2. form: whose."""

    num_queries: int = 64
    form: FormName = "qwen2_vl"

    def outputs(self, widths: Widths) -> int:
        merge_factor(self.num_queries, widths)
        return self.num_queries

    def published(self) -> Form:
        """The line of FORMS; ValueError for a form that is not there."""
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is no form of patch_merger; possible: {list(FORMS)}.")
        return FORMS[self.form]

    def build(self, widths: Widths, rngs: nnx.Rngs) -> PatchMerger:
        return PatchMerger(self, widths, rngs=rngs)

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        (H, W), s = widths.grid_HW, merge_factor(self.num_queries, widths)
        return H // s, W // s

    def semantics(self, widths: Widths) -> dict:
        form = self.published()
        return {
            "form": self.form,
            "factor": merge_factor(self.num_queries, widths),
            "channel_order": "channel, row, column" if form.channels_first else "row, column, channel",
            "norm": form.norm,
            "norm_eps": form.norm_eps,
            "norm_place": form.norm_place,
            "merging_layer": form.merge is not None,
            "bias": form.bias,
            "activation": "gelu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """The form's own."""
        form = self.published()
        table = norm("norm", form.norm_key, bias=form.norm == "layer")
        if form.merge is not None:
            table += linear("merge", form.merge, bias=False)
        return table + [line for k in (0, 1) for line in linear(f"mlp/linears/{k}", form.linears[k], bias=form.bias)]


class PatchMerger(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.form, self.widths, self.num_outputs = config.published(), widths, config.outputs(widths)
        self.factor = merge_factor(config.num_queries, widths)
        C, D, E = widths.vision_C, widths.llm_D, widths.vision_C * self.factor**2
        axis, width = ("C", C) if self.form.norm_place == "token" else ("E", E)
        self.norm = (LayerNorm if self.form.norm == "layer" else RMSNorm)(axis, width, eps=self.form.norm_eps)
        if self.form.merge is None:
            self.merge = None
            self.mlp = Mlp("EID", (E, E, D), bias=self.form.bias, rngs=rngs)
        else:
            self.merge = dense("EC", E, C, bias=False, init=torch_uniform, rngs=rngs)
            self.mlp = Mlp("CFD", (C, D, D), bias=self.form.bias, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        x_BNC, valid_BQ, assign_BQN = visible(tokens_BNC, context), None, None
        if self.form.norm_place == "token":
            x_BNC = masked(self.norm(x_BNC), context.valid_BN)  # the norm of nothing is its bias
        wide_BQE = self._gather(x_BNC)
        if self.form.norm_place == "wide token":
            wide_BQE = self.norm(wide_BQE)
        tokens_BQD = self.mlp(wide_BQE if self.merge is None else self.merge(wide_BQE))
        if context.valid_BN is not None:
            valid_BQ = self._gather(context.valid_BN[..., None]).any(-1)
        if context.assign:
            (H, W), s = self.widths.grid_HW, self.factor
            assign_BQN = bin_shares(len(tokens_BNC), (H, W), (H // s, W // s))
        return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)

    def _gather(self, tokens_BNC: jax.Array) -> jax.Array:
        return space_to_depth(tokens_BNC, self.widths.grid_HW, self.factor, channels_first=self.form.channels_first)
