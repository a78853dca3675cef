"""One table from axis letters to mesh axes. Modules know letters, this file knows meshes, nobody knows both.

Mesh axes: data (replicas of everything), fsdp (batch and one weight axis), tensor (heads and feed-forward).
A letter is sharded if its size divides; a mesh axis is used once per array, by the leftmost letter that wants it.
AxisType.Auto is stated: explicit meshes refuse an fsdp matmul whose batch and weight share a mesh axis.

    where an array lies       weights in shares over fsdp and tensor           `shardings`, `place`
    where it is used          weights whole but for tensor, rows apart         `whole`, `constrain`, below `on(mesh)`

The second line is what makes it FSDP (Rajbhandari et al. 2020, "ZeRO", stage 3): left to itself XLA's partitioner keeps
the weights in shares and sums activations of the whole global batch instead. Slices of TPUs that are joined by a data
centre's network (DCN) are laid along data, so that only gradients of what learns and the loss go between them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tcjax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
RULES = {
    "B": ("data", "fsdp"),
    "C": ("fsdp",),
    "D": ("fsdp",),
    "E": ("tensor",),
    "I": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
_MOVING = "BEFIV"  # letters by which activations are split where they are used


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all). ValueError if the sizes do not multiply to them."""
    devices = jax.devices() if devices is None else devices
    return _laid(mesh_sizes(config, len(devices)), devices)


def mesh_sizes(config: MeshConfig, count: int) -> list[int]:
    """(data, fsdp, tensor) of so many devices. ValueError if the sizes do not multiply to them."""
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh sizes are positive, and at most one is -1 (what the others leave); got {config}.")
    if -1 in sizes and known and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        raise ValueError(
            f"{config} does not multiply to the {count} devices of this process group; "
            f"sizes must divide {count}, and one may be -1."
        )
    return sizes


def _laid(sizes: list[int], devices: Sequence[Any]) -> Mesh:
    slices, auto = num_slices(devices), (AxisType.Auto,) * 3
    if slices == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=auto, devices=devices)
    data, fsdp, tensor = sizes
    if data % slices:
        raise ValueError(
            f"data={data} must be a multiple of the {slices} slices: only data goes between them, and fsdp={fsdp} times "
            f"tensor={tensor} must fit one slice of {len(devices) // slices} devices."
        )
    within = (data // slices, fsdp, tensor)
    laid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices=devices, allow_split_physical_axes=True)
    return Mesh(laid, MESH_AXES, axis_types=auto)


def num_slices(devices: Sequence[Any]) -> int:
    """TPU slices that these devices belong to; anything else is one."""
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def spec(axes: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these letters and this shape."""
    free, entries = set(MESH_AXES), []
    for letter, size in zip(axes, shape, strict=True):
        wanted = tuple(name for name in RULES.get(letter, ()) if name in free and mesh.shape[name] > 1)
        if wanted and size % math.prod(mesh.shape[name] for name in wanted) == 0:
            free -= set(wanted)
            entries.append(wanted[0] if len(wanted) == 1 else wanted)
        else:
            entries.append(None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings for a tree of nnx Variables (by their `axes`) and plain leaves (replicated).

    A Variable may hold several arrays with these axes (codes and scales of quantised weights).
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata("axes")
        return leaf.replace(
            jax.tree.map(lambda array: NamedSharding(mesh, spec(axes, array.shape, mesh)), leaf.get_value())
        )

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@contextmanager
def on(mesh: Mesh) -> Iterator[None]:
    """While a program for `mesh` is traced: `constrain` and `whole` know it, and so does tcjax.nn.attention."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """An activation with its rows (B) over data and fsdp and its heads or inner widths over tensor; letters without a rule,
    and D, are whole. Outside `on`, x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    moving = "".join(letter if letter in _MOVING else "." for letter in axes)
    return jax.lax.with_sharding_constraint(x, spec(moving, x.shape, mesh))


def as_looked_up(x: jax.Array, axes: str) -> jax.Array:
    """What was looked up in a table whose D lies in shares over fsdp: D still so, rows (B) over data alone. Outside `on`, x.

    Said before `constrain`: the exchange of shares for rows then stays inside fsdp. Left to itself XLA's partitioner
    brings every slice the rows of all others (25 MB per v5e and step at 7B and 16 rows, thrice the gradients).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    lies = ({"B": "data", "D": "fsdp"}.get(letter) for letter in axes)
    shares = (name if name and size % mesh.shape[name] == 0 else None for name, size in zip(lies, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*shares))


def row_shares(rows: int) -> int:
    """Into how many shares the current mesh parts B of this size; 1 outside one."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return ways if rows % ways == 0 else 1


def rows_apart(tree: Any) -> Any:
    """Every array of a tree by its leading axis, B."""
    return jax.tree.map(lambda x: constrain(x, "B" + "." * (x.ndim - 1)), tree)


def whole(weights: Any, axes: str) -> Any:
    """A weight as it is used: every device's own share of heads and feed-forward, all else gathered. Outside `on`, as it is.

    Codes and scale of a quantised one are gathered each, before anyone makes floats of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weights

    def one(array: jax.Array) -> jax.Array:
        own = (entry if entry == "tensor" else None for entry in spec(axes, array.shape, mesh))
        return jax.lax.with_sharding_constraint(array, PartitionSpec(*own))

    return jax.tree.map(one, weights)


def gathers() -> bool:
    """Whether `whole` has anything to gather on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def whole_now(tree: Any) -> Any:
    """`whole` for the nnx Variables of a model, but for stacks of layers (L), gathered when it is their turn, and
    vocabularies (V), gathered by whoever reads them."""
    return _each(tree, lambda value, axes: value if axes[:1] in ("L", "V") else whole(value, axes))


def whole_vectors(layer: Any) -> Any:
    """`whole` for the vectors of one layer of a stack; its matrices are gathered where something is multiplied with them."""
    return _each(layer, lambda value, axes: whole(value, axes[1:]) if len(axes) == 2 else value)


def _each(tree: Any, change: Callable[[Any, str], Any]) -> Any:
    def one(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(change(leaf.get_value(), leaf.get_metadata("axes")))

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def place(tree: Any, mesh: Mesh) -> Any:
    """The same tree with every array where `shardings` wants it, those that are there already uncopied."""
    return jax.device_put(tree, shardings(tree, mesh))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which a tree's arrays lie; None if they lie on none."""
    placed = (leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return next((sharding.mesh for sharding in placed if isinstance(sharding, NamedSharding)), None)  # pyright: ignore


def own(tree: Any) -> Any:
    """The same arrays, each whole in this process, whoever holds their shares; of several processes all must ask."""
    leaves, treedef = jax.tree.flatten(tree)
    shared = [at for at, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable]
    if shared:
        mesh = mesh_of(tree)
        assert mesh is not None, "what several processes hold lies on a mesh"
        everywhere = NamedSharding(mesh, PartitionSpec())
        every = jax.jit(lambda some: some, out_shardings=everywhere)([leaves[at] for at in shared])
        for at, leaf in zip(shared, every, strict=True):
            leaves[at] = leaf.addressable_data(0)
    return jax.tree.unflatten(treedef, leaves)


def jit_where_it_lies(function: Callable[..., Any], state: Any, **options: Any) -> Any:
    """jax.jit of `function(state, batch, ...)` for the mesh that `state` lies on: rows apart and weights gathered as in
    training; every device, so every process, gets all that comes out. Without a mesh, plain jax.jit.

    Every process gives the same whole batch.
    """
    mesh = mesh_of(state)
    if mesh is None:
        return jax.jit(function, **options)

    @functools.wraps(function)
    def on_mesh(state: Any, batch: Any, *others: Any, **named: Any) -> Any:
        with on(mesh):
            return function(whole_now(state), rows_apart(batch), *others, **named)

    return jax.jit(on_mesh, out_shardings=NamedSharding(mesh, PartitionSpec()), **options)


def check_batch(batch: int, mesh: Mesh | AbstractMesh, accumulate: int = 1) -> None:
    """ValueError unless every device gets the same number of whole samples in every microbatch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (ways * accumulate):
        raise ValueError(
            f"a global batch of {batch} does not divide over {ways} data-parallel devices and {accumulate} microbatches; "
            f"use a multiple of {ways * accumulate}."
        )


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a global batch (numpy) as global arrays sharded over (data, fsdp)."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)
