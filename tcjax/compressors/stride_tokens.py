"""Strided tokens: a uniform sub-lattice of the grid, or simply the first Q, then the LLaVA MLP. A control, not a method.

    y = W_2 gelu(W_1 x_kept)         kept: rows floor((i + 1/2) H / h), columns floor((j + 1/2) W / w); Q = h * w

Source: the baseline of pruning papers ("uniform grid stride", "first K"); mode "first" shows what the order of the
tokens alone is worth. With padding the lattice is stretched over the rows and columns that have a valid token. Points
of it that fall on an invalid one are replaced by evenly spaced ones of the valid tokens left over; with fewer than Q
valid tokens all of them are kept, and the outputs left over are invalid. Biases start at 0.
Cost: Q (C D + D^2) multiplications per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, check_grid, handed_over, visible
from tcjax.compressors.queries import GridConfig
from tcjax.interop import lines
from tcjax.interop.names import Name
from tcjax.nn.mlp import projector
from tcjax.nn.pick import in_order, spread

Mode = Literal["grid", "first"]


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """num_queries: tokens kept. mode: "grid" or "first". depth: linear layers of the MLP.

    shape: (h, w) of the lattice, for "grid"; None takes the square.
    """

    num_queries: int = 64
    mode: Mode = "grid"
    depth: int = 2
    elastic = "pooling"

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        if self.mode == "grid":
            return super().out_grid(widths)
        if not 1 <= self.num_queries <= widths.num_tokens:
            raise ValueError(
                f"num_queries={self.num_queries}: must be from 1 up to the grid's {widths.num_tokens} tokens."
            )
        return 1, self.num_queries

    def build(self, widths: Widths, rngs: nnx.Rngs) -> StrideTokens:
        return StrideTokens(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "mode": self.mode,
            "lattice": list(self.out_grid(widths)),
            "depth": self.depth,
            "activation": "gelu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """LLaVA's mm_projector."""
        return lines.mlp("mlp", "", self.depth)


class StrideTokens(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.mode not in get_args(Mode):
            raise ValueError(f"mode={config.mode!r} is no mode of stride_tokens; possible: {list(get_args(Mode))}.")
        self.widths, self.num_outputs, self.mode = widths, config.outputs(widths), config.mode
        self.lattice = config.out_grid(widths)
        self.mlp = projector(widths.vision_C, widths.llm_D, config.depth, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        seen_BNC, valid_BN = visible(tokens_BNC, context), context.valid_BN
        present_BN = jnp.ones(tokens_BNC.shape[:2], bool) if valid_BN is None else valid_BN
        kept_BN = present_BN if self.mode == "first" else self._on_lattice(present_BN)
        where_BQ, valid_BQ = in_order(kept_BN, self.num_outputs)
        kept_BQC = jnp.take_along_axis(seen_BNC, where_BQ[..., None], axis=1)
        assign_BQN = where_BQ[..., None] == jnp.arange(tokens_BNC.shape[1]) if context.assign else None
        return handed_over(self.mlp(kept_BQC), None if valid_BN is None else valid_BQ, assign_BQN, context)

    def _on_lattice(self, present_BN: jax.Array) -> jax.Array:
        """Flags of Q of the tokens present, or of all if there are fewer."""
        height, width = self.lattice
        present_BHW = present_BN.reshape(-1, *self.widths.grid_HW)
        rows_BH = spread(present_BHW.any(2), height, height)
        columns_BW = spread(present_BHW.any(1), width, width)
        lattice_BHW = present_BHW & rows_BH[:, :, None] & columns_BW[:, None]
        lattice_BN = lattice_BHW.reshape(present_BN.shape)
        missing_B = self.num_outputs - lattice_BN.sum(1)
        return lattice_BN | spread(present_BN & ~lattice_BN, self.num_outputs, missing_B)
