"""Spatial resampler of LLaVA-UHD v1: every query reads its own region of the grid, and nothing else.

    x'  = LN_kv(x W_kv)                          W_kv: C -> D without bias, left out where C = D
    k_q = R_q (x' + P_k),  v_q = R_q x'          R_q: [M, N], M sample points of region q (RoIAlign), M is 6 to 12
    z_q = MHA(LN_q(query_q) + P_q, k_q, v_q)     y = LN_post(z) W_proj

The grid is cut into sqrt(Q) x sqrt(Q) regions of H/sqrt(Q) by W/sqrt(Q) cells; w x h samples each, of 4x2, 3x2, 4x3, 3x3,
2x4, 2x3, 3x4 the one whose shape is nearest to the image's. P_q is the sin-cos table of the sqrt(Q) grid, P_k the same
table resized bicubically (tcjax.nn.positions).

Source: Xu et al. 2024, "LLaVA-UHD", as thunlp/LLaVA-UHD builds it (branch LLaVA-UHD-v1, adapt_spatial_resampler):
torchvision's roi_align with aligned=False and adaptive sampling, so a cell's centre lies on its integer coordinate and
the last row and column count more; LayerNorm eps 1e-6; initialisation as in qwen_resampler.
RoIAlign of a fixed grid is a fixed linear map: R is a constant, computed in numpy.
Departures: with padding a sample is the weighted mean of its valid cells; a sample without any is not attended to; a
region without any is no valid output. Q of more than (2 min(H, W))^2 is refused: regions would leave the grid.
Cost: N C D + (2 Q M + 2 Q) D^2 + 2 Q M N D multiplications; 88.7 M parameters for 1024 -> 4096 with 144 queries.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    CompressorConfig,
    Context,
    Widths,
    check_grid,
    handed_over,
    limited,
    one_image,
    visible,
)
from tcjax.compressors.queries import refuse_queries
from tcjax.interop.lines import attention, fixed, linear, norm
from tcjax.interop.names import Name
from tcjax.nn.attention import padding_mask
from tcjax.nn.dense import dense, rows, small_normal
from tcjax.nn.mha import MultiheadAttention, num_heads
from tcjax.nn.norm import LayerNorm
from tcjax.nn.positions import resize_matrix, sincos_2d

_EPS = 1e-6
_SAMPLES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))  # (w, h) per region; the first of equals wins


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """LLaVA-UHD's sizes. num_queries: regions, a square number. head_width: A, there are D / A heads."""

    num_queries: int = 144
    head_width: int = 128

    def outputs(self, widths: Widths) -> int:
        self.side(widths)
        return self.num_queries

    def side(self, widths: Widths) -> int:
        """sqrt(Q); ValueError if it is not whole or the regions are smaller than half a cell."""
        most, side = 2 * min(one_image(widths)), math.isqrt(max(self.num_queries, 0))
        if side * side != self.num_queries or not 1 <= side <= most:
            squares = [each**2 for each in range(1, most + 1)]
            raise refuse_queries(self.num_queries, widths, "a square number of regions", squares)
        return side

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return self.side(widths), self.side(widths)

    def build(self, widths: Widths, rngs: nnx.Rngs) -> SpatialResampler:
        return SpatialResampler(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "regions": self.side(widths),
            "samples": list(samples(widths.grid_HW)),
            "sampling": "roi_align, not aligned, adaptive",
            "heads": num_heads(widths.llm_D, self.head_width),
            "norm_eps": _EPS,
        }

    def names(self, widths: Widths) -> list[Name]:
        """LLaVA-UHD's mm_projector."""
        side, D = self.side(widths), widths.llm_D
        table = [Name("query", "query"), *fixed("pos_embed", sincos_2d((side, side), D))]
        if widths.vision_C != D:
            table += linear("kv_proj", "kv_proj", bias=False)
        table += norm("ln_q", "ln_q") + norm("ln_kv", "ln_kv") + norm("ln_post", "ln_post")
        return [*table, *attention("attn", "attn"), Name("proj", "proj")]  # used as x @ proj, so not transposed


class SpatialResampler(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs, self.side = widths, config.outputs(widths), config.side(widths)
        C, D = widths.vision_C, widths.llm_D
        sincos_2d((1, 1), D)  # a width it refuses is better refused here
        self.query = nnx.Param(small_normal(rngs.params(), (config.num_queries, D)), axes="QE")
        self.kv_proj = dense("CE", C, D, bias=False, init=small_normal, rngs=rngs) if C != D else None
        self.attn = MultiheadAttention(D, num_heads(D, config.head_width), out_init=small_normal, rngs=rngs)
        self.ln_q, self.ln_kv = LayerNorm("E", D, eps=_EPS), LayerNorm("E", D, eps=_EPS)
        self.ln_post = LayerNorm("E", D, eps=_EPS)
        self.proj = nnx.Param(D**-0.5 * rngs.params.normal((D, D)), axes="ED")

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        value_BNE = visible(tokens_BNC, context)
        value_BNE = self.ln_kv(value_BNE if self.kv_proj is None else self.kv_proj(value_BNE))
        dtype = jnp.result_type(value_BNE, self.query[...])
        (B, _, E), Q = value_BNE.shape, self.num_outputs
        square_QE = sincos_2d((self.side, self.side), E)
        on_key_NE = resize_matrix((self.side, self.side), self.widths.grid_HW) @ square_QE

        sample_QMN, scale_BQM, valid_BQ, mask_BSM = self._samples(context.valid_BN)
        valid_BQ = limited(valid_BQ, tokens_BNC, context, Q)

        def sampled(x_BNE: jax.Array) -> jax.Array:
            """float32, as the original samples: [B * Q, M, E]."""
            x_BNE = visible(x_BNE.astype(jnp.float32), context)
            drawn_BQME = jnp.einsum("QMN,BNE->BQME", sample_QMN, x_BNE)
            return (drawn_BQME * scale_BQM[..., None]).astype(dtype).reshape(B * Q, -1, E)

        query_QE = self.ln_q(self.query[...]).astype(dtype) + square_QE.astype(dtype)
        query_BSE = jnp.tile(query_QE[:, None], (B, 1, 1))  # from here on a region is a row of its own
        read_BSE, weights_BSM = self.attn(
            query_BSE,
            sampled(value_BNE + on_key_NE.astype(value_BNE.dtype)),
            sampled(value_BNE),
            mask_BSM=mask_BSM,
            weights=context.assign,
        )
        tokens_BQD = rows(self.ln_post(read_BSE.reshape(B, Q, E)), self.proj[...])
        assign_BQN = None
        if weights_BSM is not None:
            weights_BQM = weights_BSM.reshape(B, Q, -1) * scale_BQM
            assign_BQN = jnp.einsum("BQM,QMN->BQN", weights_BQM, sample_QMN)
        return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)

    def _samples(self, valid_BN: jax.Array | None) -> tuple:
        """R, what to scale a sample by so that it is a mean of valid cells, who is valid, and the mask of its keys."""
        sample_QMN = region_matrix(self.widths.grid_HW, self.side)
        share_QM = sample_QMN.sum(-1)  # 1, and less for a sample point that RoIAlign finds outside the grid
        if valid_BN is None:
            return sample_QMN, jnp.ones((1, *share_QM.shape)), None, None
        mass_BQM = jnp.einsum("QMN,BN->BQM", sample_QMN, valid_BN.astype(jnp.float32))
        some_BQM = mass_BQM > 0
        scale_BQM = jnp.where(some_BQM, share_QM / jnp.where(some_BQM, mass_BQM, 1), 0)
        seen_BQM = some_BQM | (share_QM == 0)
        return sample_QMN, scale_BQM, some_BQM.any(-1), padding_mask(seen_BQM.reshape(-1, share_QM.shape[-1]))


def samples(grid_HW: tuple[int, int]) -> tuple[int, int]:
    """(h, w) sample points per region, the shape nearest to the image's."""
    H, W = grid_HW
    width, height = min(_SAMPLES, key=lambda shape: abs(math.log(W / H) - math.log(shape[0] / shape[1])))
    return height, width


@functools.cache
def region_matrix(grid_HW: tuple[int, int], side: int) -> np.ndarray:
    """float32 [Q, M, N]: torchvision's roi_align of side x side regions, row by row; 24 x 24 and 12: [144, 9, 576]."""
    (H, W), (height, width) = grid_HW, samples(grid_HW)
    by_row, by_column = axis_matrix(H, side, height), axis_matrix(W, side, width)
    outer = by_row[:, None, :, None, :, None] * by_column[None, :, None, :, None, :]
    return outer.reshape(side * side, height * width, H * W)


def axis_matrix(size: int, side: int, num: int) -> np.ndarray:
    """float32 [side, num, size]: along one axis, num bins in each of `side` regions, each the mean of some points.

    A region is at least 1 cell long; a bin of length b has ceil(b) points; a point is interpolated linearly between
    its neighbours, at most the last one, and is 0 beyond `size`.
    """
    matrix = np.zeros((side, num, size), np.float32)
    one = np.float32(1)
    for region in range(side):
        start, end = np.float32(region * size / side), np.float32((region + 1) * size / side)
        length = max(end - start, one) / np.float32(num)
        points = math.ceil(length)
        for bin in range(num):
            for point in range(points):
                at = start + bin * length + np.float32(point + 0.5) * length / np.float32(points)
                if at > size:
                    continue
                low = min(int(at), size - 1)
                part = at - low if low < size - 1 else np.float32(0)
                matrix[region, bin, low] += (one - part) / np.float32(points)
                matrix[region, bin, min(low + 1, size - 1)] += part / np.float32(points)
    return matrix
