"""Pixel shuffle: s x s neighbours are laid side by side into one wide token, then projected. Nothing is averaged away.

    y_(i,j) = W [x_(is, js) ; x_(is, js+1) ; ... ; x_(is+s-1, js+s-1)]        Q = N / s^2

Channel order of the wide token is (dy, dx, c), c fastest. Two published heads:
  "linear": one bias-free linear layer. Laurencon et al. 2024, "Building and better understanding vision-language
      models" (Idefics3); SmolVLM.
  "mlp": LayerNorm (eps 1e-5), linear, GELU, linear. Chen et al. 2024, "How Far Are We to GPT-4V?" (InternVL 1.5), in
      Hugging Face's row-major orientation, the original's ps_version "v2". Its "v1" does not swap rows and columns
      back, so the tokens come column by column: token_order.
Qwen's and Mistral's learned mergers are patch_merger.
Departures: rectangular grids. With padding, invalid tokens enter as 0 and an output is valid if any of its s^2 tokens
is. Cost: N C D multiplications per image (+ Q D^2 for "mlp"); parameters grow with s^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

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
    visible,
)
from tcjax.compressors.queries import merge_factor
from tcjax.interop.lines import linear, norm
from tcjax.interop.names import Name
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import LayerNorm
from tcjax.nn.pool import averaging_grid, space_to_depth

Head = Literal["linear", "mlp"]
TokenOrder = Literal["row by row", "column by column"]
_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: N / s^2, where s divides both sides of the grid. head: what projects the wide tokens.

    token_order: in which order the LLM reads the blocks.
    """

    num_queries: int = 64
    head: Head = "linear"
    token_order: TokenOrder = "row by row"

    def outputs(self, widths: Widths) -> int:
        return widths.num_tokens // self.factor(widths) ** 2

    def factor(self, widths: Widths) -> int:
        """s on this grid."""
        return merge_factor(self.num_queries, widths, "a whole s x s shuffle")

    def build(self, widths: Widths, rngs: nnx.Rngs) -> PixelShuffle:
        return PixelShuffle(self, widths, rngs=rngs)

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        (H, W), s = widths.grid_HW, self.factor(widths)
        return (H // s, W // s) if self.token_order == "row by row" else (1, self.outputs(widths))

    def semantics(self, widths: Widths) -> dict:
        facts = {
            "factor": self.factor(widths),
            "channel_order": "row, column, channel",
            "output_order": self.token_order,
            "head": self.head,
        }
        return facts | ({"norm_eps": _EPS, "activation": "gelu"} if self.head == "mlp" else {})

    def names(self, widths: Widths) -> list[Name]:
        """Idefics3's connector or InternVL's mlp1."""
        if self.head == "linear":
            return linear("head", "modality_projection.proj", bias=False)
        return [*norm("norm", "mlp1.0"), *linear("head/linears/0", "mlp1.1"), *linear("head/linears/1", "mlp1.3")]


class PixelShuffle(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.head not in get_args(Head):
            raise ValueError(f"head={config.head!r} is no head of pixel_shuffle; possible: {list(get_args(Head))}.")
        if config.token_order not in get_args(TokenOrder):
            possible = list(get_args(TokenOrder))
            raise ValueError(f"token_order={config.token_order!r} is no order of tokens; possible: {possible}.")
        self.by_columns = config.token_order == "column by column"
        self.widths, self.num_outputs, self.factor = widths, config.outputs(widths), config.factor(widths)
        E, D = widths.vision_C * self.factor**2, widths.llm_D
        if config.head == "linear":
            self.norm = None
            self.head = dense("ED", E, D, bias=False, init=torch_uniform, rngs=rngs)
        else:
            self.norm = LayerNorm("E", E, eps=_EPS)
            self.head = Mlp("EFD", (E, D, D), rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        wide_BQE = self._gather(visible(tokens_BNC, context))
        tokens_BQD = self.head(wide_BQE if self.norm is None else self.norm(wide_BQE))
        valid_BQ = assign_BQN = None
        if context.valid_BN is not None:
            valid_BQ = self._gather(context.valid_BN[..., None]).any(-1)
        if context.assign:
            (H, W), s = self.widths.grid_HW, self.factor
            blocks_HWN = averaging_grid((H, W), (H // s, W // s)).reshape(H // s, W // s, H * W)
            block_QN = (blocks_HWN.swapaxes(0, 1) if self.by_columns else blocks_HWN).reshape(-1, H * W)
            assign_BQN = jnp.broadcast_to(block_QN, (len(tokens_BNC), *block_QN.shape))
        return handed_over(tokens_BQD, valid_BQ, assign_BQN, context)

    def _gather(self, tokens_BNC: jax.Array) -> jax.Array:
        """Space to depth: [B, N, C] -> [B, Q, E] with E = s * s * C in the order (dy, dx, c)."""
        return space_to_depth(tokens_BNC, self.widths.grid_HW, self.factor, by_columns=self.by_columns)
