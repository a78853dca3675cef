"""One table from axis letters to mesh axes. Modules know letters, this file knows meshes, nobody knows both.

Mesh axes: data (replicas of everything), fsdp (batch and one weight axis), tensor (heads and feed-forward).
A letter is sharded if its size divides; a mesh axis is used once per array, by the leftmost letter that wants it.
AxisType.Auto is stated: explicit meshes refuse an fsdp matmul whose batch and weight share a mesh axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
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


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all). ValueError if the sizes do not multiply to them."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh sizes are positive, and at most one is -1 (what the others leave); got {config}.")
    if -1 in sizes and known and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"{config} does not multiply to the {len(devices)} devices of this process group; "
            f"sizes must divide {len(devices)}, and one may be -1."
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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


def gathered(axes: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How a weight lies where it is used: whole, but for the heads and feed-forward that each device computes itself."""
    own = [entry if entry == "tensor" else None for entry in spec(axes, shape, mesh)]
    return NamedSharding(mesh, PartitionSpec(*own))


def place(tree: Any, mesh: Mesh) -> Any:
    """The same tree with every array where `shardings` wants it, those that are there already uncopied."""
    return jax.device_put(tree, shardings(tree, mesh))


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
