"""Initial weights of some leaves of a model, one at a time; the others are never made.

    for path, array in drawn(build, {"compressor/queries"}): ...     the bits of `build()` called as it is

The model is traced, and for one leaf after the other the operations it needs are run one by one, as an untraced build runs
them: memory holds one leaf. As one program XLA would merge the factors of N(0, 1) * sqrt(2) * deviation and so move the
last bit of every fourth weight, by up to 1e-7 of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from flax import nnx
from jax.extend import core

_SMALL = 64  # values; counters and keys that the next leaf needs, too


def drawn(build: Callable[[], nnx.Module], wanted: Collection[str]) -> Iterator[tuple[str, jax.Array]]:
    """Path ("/"-joined) and value of every leaf that is wanted; `build` makes the whole model."""
    if not wanted:
        return
    paths: list[str] = []

    def leaves() -> list[Any]:
        flat = [("/".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(nnx.state(build()))]
        paths.extend(path for path, _ in flat if path in wanted)
        return [leaf.get_value() for path, leaf in flat if path in wanted]

    traced = jax.make_jaxpr(leaves)()
    known: dict[core.Var, Any] = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    for path, var in zip(paths, traced.jaxpr.outvars, strict=True):
        yield path, _evaluate(traced.jaxpr, var, known)


def _evaluate(jaxpr: Any, wanted: Any, known: dict[core.Var, Any]) -> jax.Array:
    """One variable, by the operations it depends on; small ones on the way are added to `known`."""
    needed, operations = {wanted}, []
    for operation in reversed(jaxpr.eqns):
        if any(var in needed and var not in known for var in operation.outvars):
            needed |= {atom for atom in operation.invars if isinstance(atom, core.Var)}
            operations.append(operation)
    operations.reverse()
    last = {atom: operation for operation in operations for atom in operation.invars if isinstance(atom, core.Var)}
    here: dict[core.Var, Any] = {}

    def value(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.val
        return known[atom] if atom in known else here[atom]

    for operation in operations:
        options = operation.primitive.get_bind_params(operation.params)
        out = operation.primitive.bind(*map(value, operation.invars), **options)
        for var, result in zip(operation.outvars, out if operation.primitive.multiple_results else [out], strict=True):
            (known if result.size <= _SMALL else here)[var] = result
        for atom in operation.invars:
            if isinstance(atom, core.Var) and last[atom] is operation:
                here.pop(atom, None)
    return value(wanted)
