"""A chain of linear layers with exact erf GELU between them: LLaVA's `mlpKx_gelu` projector."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx
from jax.nn.initializers import Initializer

from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.dense import dense, torch_uniform


class Mlp(nnx.Module):
    """y = W_K gelu(... gelu(W_1 x)). Kernels start as torch's nn.Linear does (or by `init`), biases at 0.

    Args:
        axes: letters of the widths, input first: "CFD" has two layers, "C" has none. Neighbours differ.
        sizes: the widths themselves, one per letter.
    """

    def __init__(
        self, axes: str, sizes: Sequence[int], *, bias: bool = True, init: Initializer = torch_uniform, rngs: nnx.Rngs
    ):
        assert len(axes) == len(sizes) >= 1, (axes, sizes)
        self.linears = nnx.List(
            [
                dense(axes[k : k + 2], sizes[k], sizes[k + 1], bias=bias, init=init, rngs=rngs)
                for k in range(len(axes) - 1)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for k, linear in enumerate(self.linears):
            x = linear(ACTIVATIONS["gelu"](x) if k else x)
        return x


def projector(vision_C: int, llm_D: int, depth: int, *, rngs: nnx.Rngs) -> Mlp:
    """`depth` linear layers from the tower's width to the LLM's; ValueError unless 0 layers are enough for that."""
    if depth < (vision_C != llm_D):
        raise ValueError(
            f"depth={depth}: tokens of width {vision_C} need at least 1 linear layer to get the LLM's width {llm_D}, "
            f"LLaVA-1.5 has 2; depth=0 hands them on as they are where the two widths are the same."
        )
    hidden = "".join("FE"[k % 2] for k in range(depth - 1))  # neighbouring letters differ
    return Mlp(f"C{hidden}D"[: depth + 1], [vision_C] + [llm_D] * depth, rngs=rngs)
