"""From a model's config to a model whose weights lie where they belong, and the facts by which a checkpoint knows its
frozen neighbours again.

The model is traced and never built as a whole: leaf by leaf it is streamed from safetensors or drawn from the seed, turned
into the type it shall lie in, and put on the mesh. Tower and LLM are read under their published names (each file's NAMES
table). A part started by `TrainConfig.weights` is read under our own leaf paths, a compressor also from its artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
from tcjax.config import LoraConfig, MeshConfig
from tcjax.interop import artifact, hashes, names, prefixes, stream, tensors
from tcjax.interop.names import Name
from tcjax.interop.stream import Place
from tcjax.llms import decoder
from tcjax.llms import published as published_llms
from tcjax.llms.decoder import Decoder, LlmConfig
from tcjax.nn import lora as low_rank
from tcjax.nn import quantised
from tcjax.nn.draw import drawn
from tcjax.record import IS, to_dict
from tcjax.sharding import make_mesh, shardings, spec
from tcjax.towers import layouts
from tcjax.towers import published as published_towers
from tcjax.towers.dual import Dual
from tcjax.towers.vit import VitConfig

HASHES = "runs/hashes"
FROZEN = ("float32", "bfloat16", *quantised.TYPES)
PUBLISHED = ("tower", "llm")  # the parts that are read under published names, and that `frozen` is about
_LORA = 0x10A  # LoRA's own draws, whatever else the seed was used for

# Reads the leaf of this path, the part's own, to its place.
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
    lora: LoraConfig = LoraConfig(),
) -> tuple[nnx.Module, dict[str, Any]]:
    """Make the model of `config` with its weights on `mesh`, and say who it is.

    Args:
        config: of a model whose tower, llm and compressor are fields of the same names (any may be missing).
        start: {part: where to begin training from}, safetensors under our leaf paths or a compressor's artifact.
        mesh: None is the first device alone.
        trainable: the parts that learn; their weights are float32 and may be donated.
        frozen: how tower and LLM lie in memory where they do not learn (TrainConfig.frozen).
        lora: updates of the LLM; they learn.

    Returns:
        The model and its identity {fact: value}: every field of the config, and the content hash of each weights file.

    Raises:
        ValueError: a file is missing, cut short, or does not fit (every name and shape that differs is listed).
    """
    _check(frozen)
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1]) if mesh is None else mesh

    abstract, start = nnx.eval_shape(lambda: build(config, seed, lora)), start or {}
    graphdef, state = nnx.split(abstract)
    for part in start:
        if part not in state:
            raise ValueError(f"weights names {part!r}, which is no part of {type(abstract).__name__}.")
    leaves, lies = _by_path(state), _by_path(shardings(state, mesh))
    identity = {f"model.{fact}": value for fact, value in _flat(to_dict(config)) if not fact.endswith("weights")}
    reads: dict[str, Read] = {}
    for part, part_config, prefix in _parts(config, abstract):
        origin, weights = f"random from seed {seed}", part_config.weights
        if weights:
            origin = _hash(root / weights, root)
            reads[prefix] = _published(root / weights, part_config, _shapes(leaves, prefix))
        before = identity.get(f"{part}.weights")
        identity[f"{part}.weights"] = f"{before} + {origin}" if before else origin
    for part, path in start.items():
        reads = {prefix: read for prefix, read in reads.items() if not prefix.startswith(f"{part}/")}
        reads[f"{part}/"] = _started(root / path, part, config, _shapes(leaves, f"{part}/"))

    def fill(path: str, read: Callable[[Place], jax.Array]) -> None:
        leaf = leaves[path]
        kind, dtype, learns = _lies(path, leaf, trainable, frozen)
        value = read(Place(leaf.get_value().shape, dtype, lies[path].get_value(), owned=learns))
        if kind in quantised.TYPES:
            value = _quantised(value, leaf.get_metadata("axes"), kind, mesh)
        leaf.set_value(value)

    left = set(leaves)
    for prefix, read in reads.items():
        for path in _shapes(leaves, prefix):
            fill(prefix + path, partial(read, path))
            left.remove(prefix + path)
    for path, array in drawn(lambda: build(config, seed, lora), left):
        fill(path, partial(_moved, array))
    return nnx.merge(graphdef, state), identity


def build(config: Any, seed: int = 0, lora: LoraConfig = LoraConfig()) -> Any:
    """The model with first weights from the seed; also what nnx.eval_shape builds abstractly."""
    model = config.build(nnx.Rngs(seed))
    if lora.rank:
        _attach(model, lora, seed)
    return model


def abstract(config: Any, *, trainable: Collection[str], frozen: str, lora: LoraConfig) -> Any:
    """The model that `assemble` makes, of shapes and types alone."""
    _check(frozen)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(config, lora=lora)))
    for path, leaf in _by_path(state).items():
        kind, dtype, _ = _lies(path, leaf, trainable, frozen)
        value = jax.ShapeDtypeStruct(leaf.get_value().shape, dtype)
        if kind in quantised.TYPES:
            value = jax.eval_shape(partial(quantised.quantise, kind=kind), value)
        leaf.set_value(value)
    return nnx.merge(graphdef, state)


def _check(frozen: str) -> None:
    if frozen not in FROZEN:
        raise ValueError(f"frozen={frozen!r} is not one of {list(FROZEN)}.")


def _lies(path: str, leaf: Any, trainable: Collection[str], frozen: str) -> tuple[str, Any, bool]:
    """How a leaf lies in memory: one of FROZEN, the type it is read in, and whether it learns."""
    part, dtype = path.partition("/")[0], leaf.get_value().dtype
    learns = part in trainable or _is_lora(path)
    if learns or part not in PUBLISHED or frozen == "float32" or not jnp.issubdtype(dtype, jnp.floating):
        return "float32", dtype, learns
    whole = frozen in quantised.TYPES and not _is_kernel_of_blocks(path, leaf)
    return "bfloat16" if whole else frozen, jnp.bfloat16, learns


def _attach(model: nnx.Module, config: LoraConfig, seed: int) -> None:
    """Updates of low rank beside the layers of the model's LLM, in place; they change nothing before they learn.

    Raises:
        ValueError: the model has no LLM, or a target is none of its layers.
    """
    llm = getattr(model, "llm", None)
    if not isinstance(llm, Decoder):
        raise ValueError(f"train.lora adds to an LLM, and {type(model).__name__} has none.")
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), _LORA))
    low_rank.attach(llm.blocks, (llm.cfg.layers,), config, rngs)


def _by_path(state: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _is_lora(path: str) -> bool:
    return low_rank.is_lora(tuple(path.split("/")))


def _shapes(leaves: dict[str, Any], prefix: str) -> names.Shapes:
    """Of what lies below a prefix, updates left out: those are in no published file."""
    return {
        path.removeprefix(prefix): tuple(leaf.get_value().shape)
        for path, leaf in leaves.items()
        if path.startswith(prefix) and not _is_lora(path)
    }


def _parts(config: Any, model: Any) -> Iterator[tuple[str, Any, str]]:
    """(part, config, prefix of its leaves) of everything with weights of its own: the tower as the compressor wants it (a
    dual tower is two), and the llm."""
    if getattr(config, "tower", None) is not None:
        if isinstance(model.tower, Dual):
            yield from (("tower", tower.cfg, f"tower/towers/{n}/") for n, tower in enumerate(model.tower.towers))
        else:
            yield "tower", model.tower.cfg, "tower/"
    if getattr(config, "llm", None) is not None:
        yield "llm", config.llm, "llm/"


def published_names(part_config: Any) -> tuple[list[Name], list[str]]:
    """The NAMES table of a tower or an LLM, and patterns of the published tensors it has no use for."""
    room = {VitConfig: layouts, LlmConfig: decoder}[type(part_config)]
    return room.names(part_config), room.ignore(part_config)


def places(part_config: Any, found: Collection[str]) -> dict[str, str]:
    """{published name: name on disk} of a tower's or an LLM's tensors among these; ValueError if the part is not there."""
    if isinstance(part_config, VitConfig):
        where = f"a tower with {part_config.names} names in {part_config.weights}"
        return prefixes.places(found, layouts.LAYOUTS[part_config.names], layouts.SIGN[part_config.names], where)
    where = f"an LLM in {part_config.weights}"
    return prefixes.places(found, published_llms.LAYOUTS, published_llms.SIGN, where)


def _published(path: Path, part_config: Any, shapes: names.Shapes) -> Read:
    """Leaves of a downloaded tower or LLM."""
    room = {VitConfig: published_towers, LlmConfig: published_llms}[type(part_config)]
    room.check(path if path.is_dir() else path.parent, part_config)
    found, (table, ignored) = tensors.find(path), published_names(part_config)
    stored = {ours: found[there] for ours, there in places(part_config, found).items()}
    names.check(stored, table, shapes, ignore=ignored, what=f"tensors of {path}")
    fixed = [name for name in table if name.value is not None]
    names.refuse_other_values({name.torch: stored[name.torch].mapped() for name in fixed}, fixed)
    lines = {name.jax: name for name in table if name.value is None}
    return lambda leaf, place: stream.leaf(lines[leaf], stored, place)


def _started(path: Path, part: str, config: Any, shapes: names.Shapes) -> Read:
    """Leaves under our own paths, or a compressor's from its artifact."""
    if artifact.kind_of(path) == artifact.KIND:
        arrays = _from_artifact(path, getattr(config, part), config.widths, shapes)
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


def _is_kernel_of_blocks(path: str, leaf: nnx.Variable) -> bool:
    """Of a stacked linear layer; what embeds patches and words is not quantised."""
    return path.endswith("/kernel") and leaf.get_metadata("axes")[0] == "L" and len(leaf.get_metadata("axes")) == 3


def _quantised(kernel: jax.Array, axes: str, kind: str, mesh: Mesh) -> quantised.Quantised:
    """The kernel in `kind` on the same devices; the kernel itself is let go."""
    quantise = partial(quantised.quantise, kind=kind)
    where = jax.tree.map(lambda x: NamedSharding(mesh, spec(axes, x.shape, mesh)), jax.eval_shape(quantise, kernel))
    return jax.jit(quantise, out_shardings=where)(kernel)


def _hash(path: Path, root: Path) -> str:
    """The content hash of published weights; of several processes the first reads them and tells the others."""
    if jax.process_count() == 1:
        return hashes.content_hash(path, root / HASHES)
    tensors.find(path)  # what is wrong with the files is said by every process
    digest = hashes.content_hash(path, root / HASHES) if jax.process_index() == 0 else "00" * 32
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(bytes.fromhex(digest), np.uint8))
    return np.asarray(told, np.uint8).tobytes().hex()


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(n): item for n, item in enumerate(value)}
    if isinstance(value, dict):
        here = [(path, value[IS])] if IS in value else []
        return here + [
            pair for key, item in value.items() if key != IS for pair in _flat(item, f"{path}.{key}" if path else key)
        ]
    return [(path, value)]
