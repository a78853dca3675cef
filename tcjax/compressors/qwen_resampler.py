"""Single-layer resamplers with sin-cos positions: Qwen-VL, OmniLMM, MiniCPM-V 2.0 to 4.5, LLaVA-UHD.

    x' = LN_kv(x W_kv)            W_kv: C -> D without bias, left out where C = D
    z  = MHA(LN_q(queries) + P_q, x' + P_k, x')          no position on the values, no residual, no feed-forward
    y  = LN_post(z) W_proj        with `post`

P is the fixed table of tcjax.nn.positions. What a form puts where, and whether checkpoints hold the queries' table:

    form          P_q            P_k                                              pos_embed    source
    qwen_vl       sqrt(M) grid   the queries' table, resized bicubically          saved        Bai et al. 2023
    omnilmm       sqrt(M) grid   the queries' table, resized bicubically          saved        OpenBMB, omnilmm/
    minicpm_v2    sqrt(M) grid   exact for the image's grid                       saved        OpenBMB, MiniCPM-V 2.0
    minicpm_v25   -              exact for the image's grid                       not saved    Yao et al. 2024; also 2.6
    minicpm_v45   -              exact, + the frame's 1-D table in a video        not saved    Yu et al. 2025, "3D"
    uhd           -              a sqrt(M) grid's table, resized bicubically      saved        thunlp/LLaVA-UHD, main

M = max_queries, whose first num_queries are used: outputs do not see each other. LayerNorm eps 1e-6; queries, W_kv and
the attention's W_o start N(0, 0.02^2), W_proj N(0, 1/D). In Qwen-VL LN_post and W_proj belong to the vision tower.
Departures: grids that are not square work in every form (in OmniLMM and Qwen-VL they do not). Padding is masked out of
the keys wherever it lies. The forms that resize do so in float32; UHD computes everything in bfloat16.
Cost: N C D + (2 N + 2 Q) D^2 + 2 Q N D + Q D^2 multiplications; 88.7 M parameters for 1024 -> 4096 with 64 queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

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
from tcjax.interop.lines import attention, fixed, linear, norm
from tcjax.interop.names import Name
from tcjax.nn.attention import padding_mask
from tcjax.nn.dense import dense, rows, small_normal
from tcjax.nn.mha import MultiheadAttention, num_heads
from tcjax.nn.norm import LayerNorm
from tcjax.nn.positions import resize_matrix, sincos_1d, sincos_2d, square_side

_EPS = 1e-6


class _Form(NamedTuple):
    """A row of the table above. prefix: what the published names of everything but ln_post and proj begin with."""

    on_queries: bool
    on_keys: Literal["resized", "exact"]
    saved: bool
    video: bool = False
    prefix: str = ""


FORMS = {
    "qwen_vl": _Form(True, "resized", saved=True, prefix="attn_pool."),
    "omnilmm": _Form(True, "resized", saved=True),
    "minicpm_v2": _Form(True, "exact", saved=True),
    "minicpm_v25": _Form(False, "exact", saved=False),
    "minicpm_v45": _Form(False, "exact", saved=False, video=True),
    "uhd": _Form(False, "resized", saved=True),
}


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """Qwen-VL's sizes. form: a row of the table above. head_width: A, there are D / A heads.

    max_queries: queries with weights (M), a square where the form lays them on a grid; None means exactly num_queries.
    post: with LN_post and W_proj.
    frame_step: frame f of a video has position f * frame_step. MiniCPM-V 4.5 counts tenths of a second.
    """

    num_queries: int = 256
    form: str = "qwen_vl"
    head_width: int = 128
    post: bool = True
    frame_step: int = 1
    elastic = "prefix"

    def outputs(self, widths: Widths) -> int:
        self.side()
        return super().outputs(widths)

    def build(self, widths: Widths, rngs: nnx.Rngs) -> QwenResampler:
        return QwenResampler(self, widths, rngs=rngs)

    def facts(self) -> _Form:
        """The form's row; ValueError if there is none of this name."""
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is none of {list(FORMS)}.")
        return FORMS[self.form]

    def side(self) -> int | None:
        """sqrt(M), or None in a form whose queries have no grid; ValueError if it is not whole."""
        facts, most = self.facts(), self.weighted()
        if not (facts.on_queries or facts.on_keys == "resized"):
            return None
        return square_side(most, f"form={self.form!r}")

    def semantics(self, widths: Widths) -> dict:
        facts = self.facts()
        return {
            "form": self.form,
            "max_queries": self.weighted(),
            "heads": num_heads(widths.llm_D, self.head_width),
            "norm_eps": _EPS,
            "queries_have_positions": facts.on_queries,
            "key_positions": facts.on_keys,
            "frame_positions": self.frame_positions(widths),
            "pos_embed_is_saved": facts.saved,
            "key_prefix": facts.prefix,
            "post": self.post,
        }

    def frame_positions(self, widths: Widths) -> list[int]:
        """Of every frame of a video; an image has none."""
        return [f * self.frame_step for f in range(widths.frames)] if widths.frames > 1 else []

    def names(self, widths: Widths) -> list[Name]:
        facts, side, D = self.facts(), self.side(), widths.llm_D
        table = [Name("query", f"{facts.prefix}query")]
        if facts.saved:
            assert side is not None
            table += fixed(f"{facts.prefix}pos_embed", sincos_2d((side, side), D))
        if widths.vision_C != D:
            table += linear("kv_proj", f"{facts.prefix}kv_proj", bias=False)
        table += norm("ln_q", f"{facts.prefix}ln_q") + norm("ln_kv", f"{facts.prefix}ln_kv")
        table += attention("attn", f"{facts.prefix}attn")
        if self.post:
            table += [*norm("ln_post", "ln_post"), Name("proj", "proj")]  # used as x @ proj, so not transposed
        return table


class QwenResampler(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if not config.facts().video:
            one_image(widths)
        if config.frame_step < 1:
            raise ValueError(f"frame_step={config.frame_step}: must be at least 1.")
        self.widths, self.config, self.num_outputs = widths, config, config.outputs(widths)
        C, D = widths.vision_C, widths.llm_D
        sincos_2d((1, 1), D)  # a width it refuses is better refused here
        most = config.weighted()
        self.query = nnx.Param(small_normal(rngs.params(), (most, D)), axes="QE")
        self.kv_proj = dense("CE", C, D, bias=False, init=small_normal, rngs=rngs) if C != D else None
        self.attn = MultiheadAttention(D, num_heads(D, config.head_width), out_init=small_normal, rngs=rngs)
        self.ln_q, self.ln_kv = LayerNorm("E", D, eps=_EPS), LayerNorm("E", D, eps=_EPS)
        self.ln_post = LayerNorm("E", D, eps=_EPS) if config.post else None
        self.proj = nnx.Param(D**-0.5 * rngs.params.normal((D, D)), axes="ED") if config.post else None

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        value_BNE = visible(tokens_BNC, context)
        value_BNE = self.ln_kv(value_BNE if self.kv_proj is None else self.kv_proj(value_BNE))
        query_QE = self.ln_q(self.query[...][: self.num_outputs])
        dtype = jnp.result_type(value_BNE, query_QE)
        on_query_QE, on_key_NE = positions(self.config, self.widths)
        query_BQE = (query_QE.astype(dtype) + on_query_QE.astype(dtype))[None]
        key_BNE = value_BNE.astype(dtype) + on_key_NE.astype(dtype)
        mask_BSM = padding_mask(context.valid_BN)
        tokens_BQD, assign_BQN = self.attn(
            query_BQE, key_BNE, value_BNE.astype(dtype), mask_BSM=mask_BSM, weights=context.assign
        )
        if self.ln_post is not None and self.proj is not None:
            tokens_BQD = rows(self.ln_post(tokens_BQD), self.proj[...])
        return handed_over(tokens_BQD, any_valid(tokens_BNC, context, self.num_outputs), assign_BQN, context)


def positions(config: Config, widths: Widths) -> tuple[np.ndarray, np.ndarray]:
    """What is added to the queries, [Q, D], and to the keys, [N, D] with the frames one after another; float32."""
    facts, side, D = config.facts(), config.side(), widths.llm_D
    square_ME = sincos_2d((side, side), D) if side else np.zeros((config.num_queries, D), np.float32)
    on_query_QE = square_ME[: config.num_queries] * np.float32(facts.on_queries)
    on_key_NE = sincos_2d(widths.grid_HW, D)
    if facts.on_keys == "resized":
        assert side is not None
        on_key_NE = resize_matrix((side, side), widths.grid_HW) @ square_ME
    frames = config.frame_positions(widths)
    if frames:
        frame_HE = sincos_1d(np.array(frames), D)
        on_key_NE = (frame_HE[:, None] + on_key_NE).reshape(-1, D)
    return on_query_QE, on_key_NE
