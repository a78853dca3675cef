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
        axes: letters of the widths, input first: "CFD" has two layers. Neighbours differ.
        sizes: the widths themselves, one per letter.
    """

    def __init__(self, axes: str, sizes: Sequence[int], *, init: Initializer = torch_uniform, rngs: nnx.Rngs):
        assert len(axes) == len(sizes) >= 2, (axes, sizes)
        self.linears = nnx.List(
            [dense(axes[k : k + 2], sizes[k], sizes[k + 1], init=init, rngs=rngs) for k in range(len(axes) - 1)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.linears[0](x)
        for linear in self.linears[1:]:
            x = linear(ACTIVATIONS["gelu"](x))
        return x
