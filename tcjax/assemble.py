"""From a model's config to a model whose weights lie where they belong, and the facts by which a checkpoint knows its
frozen neighbours again.

The model is traced and never built as a whole: leaf by leaf it is streamed from safetensors or drawn from the seed, turned
into the type it shall lie in, and put on the mesh. Tower and LLM are read under their published names (each file's NAMES
table). A part started by `TrainConfig.weights` is read under our own leaf paths, a compressor also from its artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from tcjax.compressors.base import CompressorConfig
from tcjax.config import MeshConfig
from tcjax.interop import artifact, hashes, names, stream, tensors
from tcjax.interop.names import Name
from tcjax.interop.stream import Place
from tcjax.llms import decoder
from tcjax.llms.decoder import LlmConfig
from tcjax.nn import quantised
from tcjax.nn.draw import drawn
from tcjax.record import IS, to_dict
from tcjax.sharding import gathered, make_mesh, shardings, spec
from tcjax.towers import vit
from tcjax.towers.vit import VitConfig

HASHES = "runs/hashes"
FROZEN = ("float32", "bfloat16", *quantised.TYPES)
PUBLISHED = ("tower", "llm")  # the parts that are read under published names, and that `frozen` is about

# Reads the leaf of this path to its place.
Read = Callable[[str, Place], jax.Array]


def assemble(
    config: Any,
    *,
    root: Path,
    seed: int = 0,
    start: dict[str, str] | None = None,
    mesh: Mesh | None = None,
    trainable: Collection[str] = (),
    frozen: str = "float32",
) -> tuple[nnx.Module, dict[str, Any]]:
    """Make the model of `config` with its weights on `mesh`, and say who it is.

    Args:
        config: of a model whose tower, llm and compressor are fields of the same names (any may be missing).
        start: {part: where to begin training from}, safetensors under our leaf paths or a compressor's artifact.
        mesh: None is the first device alone.
        trainable: the parts that learn; their weights are float32 and may be donated.
        frozen: how tower and LLM lie in memory where they do not learn (TrainConfig.frozen).

    Returns:
        The model and its identity {fact: value}: every field of the config, and the content hash of each weights file.

    Raises:
        ValueError: a file is missing, cut short, or does not fit (every name and shape that differs is listed).
    """
    if frozen not in FROZEN:
        raise ValueError(f"frozen={frozen!r} is not one of {list(FROZEN)}.")
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1]) if mesh is None else mesh

    def build() -> nnx.Module:
        return config.build(nnx.Rngs(seed))

    abstract, start = nnx.eval_shape(build), start or {}
    graphdef, state = nnx.split(abstract)
    for part in start:
        if part not in state:
            raise ValueError(f"weights names {part!r}, which is no part of {type(abstract).__name__}.")
    identity = {f"model.{fact}": value for fact, value in _flat(to_dict(config)) if not fact.endswith("weights")}
    reads: dict[str, Read] = {}
    for part in state:
        part_config, shapes = getattr(config, part, None), names.shapes(state[part])
        weights = getattr(part_config, "weights", "")
        if part in PUBLISHED and part_config is not None:
            identity[f"{part}.weights"] = _hash(root / weights, root) if weights else f"random from seed {seed}"
        if part in start:
            reads[part] = _started(root / start[part], part_config, config, shapes)
        elif weights:
            reads[part] = _published(root / weights, part_config, shapes)

    leaves, lies = dict(nnx.to_flat_state(state)), dict(nnx.to_flat_state(shardings(state, mesh)))

    def fill(path: tuple, read: Callable[[Place], jax.Array]) -> None:
        leaf, old = leaves[path], leaves[path].get_value()
        kind = frozen if path[0] in PUBLISHED and path[0] not in trainable else "float32"
        narrow = kind != "float32" and jnp.issubdtype(old.dtype, jnp.floating)
        dtype = jnp.bfloat16 if narrow else old.dtype
        value = read(Place(old.shape, dtype, lies[path].get_value(), owned=path[0] in trainable))
        if kind in quantised.TYPES and _is_kernel_of_blocks(path, leaf):
            value = _quantised(value, leaf.get_metadata("axes"), kind, mesh)
        leaf.set_value(value)

    for path in leaves:
        if path[0] in reads:
            fill(path, partial(reads[path[0]], "/".join(map(str, path[1:]))))
    for path, array in drawn(build, state.keys() - reads.keys()):
        fill(path, partial(_moved, array))
    return nnx.merge(graphdef, state), identity


def published_names(part_config: Any) -> tuple[list[Name], list[str]]:
    """The NAMES table of a tower or an LLM, and patterns of the published tensors it has no use for."""
    room = {VitConfig: vit, LlmConfig: decoder}[type(part_config)]
    return room.names(part_config), room.ignore(part_config)


def _published(path: Path, part_config: Any, shapes: names.Shapes) -> Read:
    """Leaves of a downloaded tower or LLM."""
    stored, (table, ignored) = tensors.find(path), published_names(part_config)
    names.check(stored, table, shapes, ignore=ignored, what=f"tensors of {path}")
    fixed = [name for name in table if name.value is not None]
    names.refuse_other_values({name.torch: stored[name.torch].mapped() for name in fixed}, fixed)
    lines = {name.jax: name for name in table if name.value is None}
    return lambda leaf, place: stream.leaf(lines[leaf], stored, place)


def _started(path: Path, part_config: Any, config: Any, shapes: names.Shapes) -> Read:
    """Leaves under our own paths, or a compressor's from its artifact."""
    if artifact.kind_of(path) == artifact.KIND:
        arrays = _from_artifact(path, part_config, config.widths, shapes)
        return lambda leaf, place: _moved(arrays[leaf], place)
    stored, table = tensors.find(path), [Name(leaf, leaf) for leaf in shapes]
    names.check(stored, table, shapes, what=f"leaves of {path}")
    return lambda leaf, place: stream.leaf(Name(leaf, leaf), stored, place)


def _from_artifact(folder: Path, wanted: Any, widths: Any, shapes: names.Shapes) -> names.Arrays:
    """The leaves of an artifact that holds just this compressor; if it reads any number of tokens, from whichever tower."""
    if not isinstance(wanted, CompressorConfig):
        raise ValueError(f"{folder} is the artifact of a compressor; weights for another part are safetensors files.")
    content, facts = artifact.read(folder), wanted.describe(widths)
    free = {"grid", "extra"} if facts["any_num_tokens"] else set()
    asked = {fact: value for fact, value in facts.items() if fact not in free}
    found = {fact: value for fact, value in content.facts.items() if fact not in free}
    artifact.check_same(found, asked, f"the artifact {folder} and the compressor that is asked for")
    return names.from_torch(content.published, wanted.names(widths), shapes)


def _moved(array: Any, place: Place) -> jax.Array:
    return jax.device_put(array.astype(place.dtype), place.sharding, may_alias=False)


def _is_kernel_of_blocks(path: tuple, leaf: nnx.Variable) -> bool:
    """Of a stacked linear layer; what embeds patches and words is not quantised."""
    return path[-1] == "kernel" and leaf.get_metadata("axes")[0] == "L" and len(leaf.get_metadata("axes")) == 3


def _quantised(kernel: jax.Array, axes: str, kind: str, mesh: Mesh) -> quantised.Quantised:
    """The kernel in `kind` on the same devices; the kernel itself is let go."""
    quantise = partial(quantised.quantise, kind=kind)
    where = jax.tree.map(lambda x: NamedSharding(mesh, spec(axes, x.shape, mesh)), jax.eval_shape(quantise, kernel))
    made = jax.jit(quantise, out_shardings=where)(kernel)
    codes, scale = (gathered(axes[1:], array.shape[1:], mesh) for array in (made.codes, made.scale))
    return replace(made, gathered=(codes, scale))


def _hash(path: Path, root: Path) -> str:
    """The content hash of published weights; of several processes the first reads them and tells the others."""
    if jax.process_count() == 1:
        return hashes.content_hash(path, root / HASHES)
    tensors.find(path)  # what is wrong with the files is said by every process
    digest = hashes.content_hash(path, root / HASHES) if jax.process_index() == 0 else "00" * 32
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(bytes.fromhex(digest), np.uint8))
    return np.asarray(told, np.uint8).tobytes().hex()


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        here = [(path, value[IS])] if IS in value else []
        return here + [
            pair for key, item in value.items() if key != IS for pair in _flat(item, f"{path}.{key}" if path else key)
        ]
    return [(path, value)]
