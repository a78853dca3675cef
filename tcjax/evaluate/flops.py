"""Matrix-multiplication FLOPs of any JAX function, counted on its jaxpr: nothing is compiled, nothing is run.

    dot_general: 2 * batch * free_left * free_right * contracted.  A scan counts its body times its length.

FLOPs = 2 * MACs. Elementwise work is left out, as in every published table. Why not `compile().cost_analysis()`: XLA
counts the body of a loop once, so a scanned stack of L layers would look like one (tests/test_cost.py shows it).

A while loop whose length is data (the chunked loss stops at the last supervised position) is refused, or counted at its
longest: it is taken to walk every array that it slices by its counter from end to end, S / 32 turns for the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(function: Callable, *args: Any, longest: bool = False) -> int:
    """FLOPs of `function(*args)`; args are arrays or jax.ShapeDtypeStructs.

    ValueError for a loop of unknown length around a matrix multiplication, unless it is to be counted at its `longest`
    and slices something by its counter.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, _flops, longest)


def matmul_bytes(function: Callable, *args: Any, longest: bool = False) -> int:
    """Bytes that these matrix multiplications read and write: both operands and the result of each, whatever is fused."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr, _bytes, longest)


def _count(jaxpr: Any, cost: Callable[[Any], int], longest: bool) -> int:
    return sum(_equation(equation, cost, longest) for equation in jaxpr.eqns)


def _equation(equation: Any, cost: Callable[[Any], int], longest: bool) -> int:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        return cost(equation)
    if name == "cond":
        return max(_count(branch.jaxpr, cost, longest) for branch in params["branches"])
    if name in ("pallas_call", "ffi_call"):
        raise ValueError(f"{name}: what a custom kernel computes cannot be read off; count on the plain path (CPU).")
    inner = sum(_count(jaxpr, cost, longest) for jaxpr in _inside(params))
    if name == "scan":
        return params["length"] * inner
    if name == "while" and inner:
        return inner * _turns(params, longest)
    return inner


def _flops(equation: Any) -> int:
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contract_left, _), (batch_left, _) = params["dimension_numbers"]
        left, right = (variable.aval.shape for variable in equation.invars)
        contracted = math.prod(left[axis] for axis in contract_left)
        shared = contracted * math.prod(left[axis] for axis in batch_left)
        return 2 * math.prod(left) * math.prod(right) // shared if shared else 0
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features = kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out) * math.prod(kernel) // features


def _bytes(equation: Any) -> int:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def _turns(params: dict[str, Any], longest: bool) -> int:
    body = params["body_jaxpr"].jaxpr
    carried = body.invars[params["body_nconsts"] :]
    counters = {  # scalars to which a turn adds something
        id(before)
        for before, after in zip(carried, body.outvars, strict=True)
        for equation in body.eqns
        if equation.primitive.name == "add" and equation.outvars == [after] and before in equation.invars
        if not before.aval.shape and before.aval.dtype.kind in "iu"
    }
    walked = list(_walked(body, counters))
    if not (longest and walked):
        raise ValueError("a while loop multiplies matrices, and how often is unknown before it runs; use scan.")
    return max(walked)


def _walked(jaxpr: Any, moving: set[int]) -> Iterator[int]:
    """Turns that each slice at a moving place needs to reach the end of its array."""
    moving = set(moving)
    for equation in jaxpr.eqns:
        moves = [id(variable) in moving for variable in equation.invars]
        if not any(moves):
            continue
        moving |= {id(variable) for variable in equation.outvars}
        if equation.primitive.name == "dynamic_slice":
            whole, part = equation.invars[0].aval.shape, equation.params["slice_sizes"]
            for size, taken, moved in zip(whole, part, moves[1:], strict=True):
                if moved and taken:
                    yield -(-size // taken)
        for inner in _inside(equation.params):
            if len(inner.invars) == len(moves):  # a call
                yield from _walked(inner, {id(v) for v, moved in zip(inner.invars, moves, strict=True) if moved})


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs an equation calls: jit, remat, custom derivatives, loops."""
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
