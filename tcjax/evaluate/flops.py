"""Matrix-multiplication FLOPs of any JAX function, counted on its jaxpr: nothing is compiled, nothing is run.

    dot_general: 2 * batch * free_left * free_right * contracted.  A scan counts its body times its length.

FLOPs = 2 * MACs. Elementwise work is left out, as in every published table. Why not `compile().cost_analysis()`: XLA
counts the body of a loop once, so a scanned stack of L layers would look like one (tests/test_cost.py shows it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(function: Callable, *args: Any) -> int:
    """FLOPs of `function(*args)`; args are arrays or jax.ShapeDtypeStructs. ValueError for a loop of unknown length."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract_left, _), (batch_left, _) = params["dimension_numbers"]
        left, right = (variable.aval.shape for variable in equation.invars)
        contracted = math.prod(left[axis] for axis in contract_left)
        shared = contracted * math.prod(left[axis] for axis in batch_left)
        return 2 * math.prod(left) * math.prod(right) // shared if shared else 0
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(out) * math.prod(kernel) // features
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    if name in ("pallas_call", "ffi_call"):
        raise ValueError(f"{name}: what a custom kernel computes cannot be read off; count on the plain path (CPU).")
    inner = sum(_count(jaxpr) for jaxpr in _inside(params))
    if name == "scan":
        return params["length"] * inner
    if name == "while" and inner:
        raise ValueError("a while loop multiplies matrices, and how often is unknown before it runs; use scan.")
    return inner


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs an equation calls: jit, remat, custom derivatives, loops."""
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
