"""MLP projector: every visual token becomes one LLM token. The reference without compression.

    y_n = W_2 gelu(W_1 x_n)                  Q = N, tokens do not meet

Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning" (LLaVA-1.5, `mlp2x_gelu`); keys 0 and 2
of `mm_projector` are linears 0 and 1 here. `depth` K gives `mlpKx_gelu`.
Departure: biases start at 0, torch draws them. Cost: N (C D + (K - 1) D^2) multiplications per image.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    only_grid,
    visible,
)
from tcjax.compressors.queries import refuse_queries
from tcjax.interop import lines
from tcjax.interop.names import Name
from tcjax.nn.mlp import projector


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """num_queries: None is all N tokens; a number is a check, only N is possible. depth: linear layers."""

    num_queries: int | None = None
    depth: int = 2

    def outputs(self, widths: Widths) -> int:
        only_grid(widths)
        if self.num_queries is not None and self.num_queries != widths.num_tokens:
            raise refuse_queries(self.num_queries, widths, "the full number of tokens", [widths.num_tokens])
        return widths.num_tokens

    def build(self, widths: Widths, rngs: nnx.Rngs) -> MlpProjector:
        return MlpProjector(self, widths, rngs=rngs)

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return widths.frames * widths.grid_HW[0], widths.grid_HW[1]

    def semantics(self, widths: Widths) -> dict:
        return {"depth": self.depth, "activation": "gelu"}

    def names(self, widths: Widths) -> list[Name]:
        """LLaVA's mm_projector: an nn.Sequential whose even members are the linear layers."""
        return lines.mlp("mlp", "", self.depth)


class MlpProjector(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        if config.depth < 1:
            raise ValueError(f"depth={config.depth}: a projector has at least 1 linear layer; LLaVA-1.5 has 2.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.mlp = projector(widths.vision_C, widths.llm_D, config.depth, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        B, N, _ = tokens_BNC.shape
        tokens_BQD = self.mlp(visible(tokens_BNC, context))
        assign_BQN = jnp.broadcast_to(jnp.eye(N), (B, N, N)) if context.assign else None
        return handed_over(tokens_BQD, context.valid_BN, assign_BQN, context)
