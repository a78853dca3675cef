"""From a model's config to a model with its weights, and the facts by which a checkpoint knows its frozen neighbours again.

Tower and LLM are read from safetensors under their published names (each file's NAMES table). A part started by
`TrainConfig.weights` is read under our own leaf paths, a compressor also from its artifact. Parts without weights start from
the seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from flax import nnx

from tcjax.compressors.base import CompressorConfig
from tcjax.interop import artifact, names, prefixes, tensors
from tcjax.llms import decoder
from tcjax.llms.decoder import LlmConfig
from tcjax.record import IS, to_dict
from tcjax.towers import layouts, published
from tcjax.towers.dual import Dual
from tcjax.towers.vit import VitConfig


def assemble(
    config: Any, *, root: Path, seed: int = 0, start: dict[str, str] | None = None
) -> tuple[nnx.Module, dict[str, Any]]:
    """Build `config`, fill in the weights, and say who it is.

    Args:
        config: of a model whose tower, llm and compressor are fields of the same names (any may be missing).
        start: {part: where to begin training from}, safetensors under our leaf paths or a compressor's artifact.

    Returns:
        The model and its identity {fact: value}: every field of the config, and the content hash of each weights file.

    Raises:
        ValueError: a file is missing, cut short, or does not fit (every name and shape that differs is listed).
    """
    model = config.build(nnx.Rngs(seed))
    identity = {f"model.{fact}": value for fact, value in _flat(to_dict(config)) if not fact.endswith("weights")}
    for part, part_config, module in _parts(config, model):
        origin = f"random from seed {seed}"
        if part_config.weights:
            path = root / part_config.weights
            if isinstance(part_config, VitConfig):
                published.check(path if path.is_dir() else path.parent, part_config)
            arrays = tensors.load(path)
            origin = tensors.content_hash(arrays)
            table, ignored = published_names(part_config)
            arrays = {ours: arrays[there] for ours, there in places(part_config, arrays).items()}
            names.assign(module, names.from_torch(arrays, table, names.shapes(module), ignore=ignored))
        before = identity.get(f"{part}.weights")
        identity[f"{part}.weights"] = f"{before} + {origin}" if before else origin
    for part, path in (start or {}).items():
        if not hasattr(model, part):
            raise ValueError(f"weights names {part!r}, which is no part of {type(model).__name__}.")
        module = getattr(model, part)
        if artifact.kind_of(root / path) == artifact.KIND:
            arrays = _from_artifact(root / path, module, getattr(config, part), config.widths)
        else:
            arrays = names.matching(tensors.load(root / path), names.shapes(module))
        names.assign(module, arrays)
    return model, identity


def _from_artifact(folder: Path, module: nnx.Module, wanted: Any, widths: Any) -> names.Arrays:
    """The leaves of an artifact that holds just this compressor; if it reads any number of tokens, from whichever tower."""
    if not isinstance(wanted, CompressorConfig):
        raise ValueError(f"{folder} is the artifact of a compressor; weights for another part are safetensors files.")
    content, facts = artifact.read(folder), wanted.describe(widths)
    free = {"grid", "extra"} if facts["any_num_tokens"] else set()
    asked = {fact: value for fact, value in facts.items() if fact not in free}
    found = {fact: value for fact, value in content.facts.items() if fact not in free}
    artifact.check_same(found, asked, f"the artifact {folder} and the compressor that is asked for")
    return names.from_torch(content.published, wanted.names(widths), names.shapes(module))


def published_names(part_config: Any) -> tuple[list[names.Name], list[str]]:
    """The NAMES table of a tower or an LLM, and patterns of the published tensors it has no use for."""
    room = {VitConfig: layouts, LlmConfig: decoder}[type(part_config)]
    return room.names(part_config), room.ignore(part_config)


def places(part_config: Any, found: Collection[str]) -> dict[str, str]:
    """{published name: name on disk} of a tower's or an LLM's tensors among these; ValueError if the part is not there."""
    if isinstance(part_config, VitConfig):
        where = f"a tower with {part_config.names} names in {part_config.weights}"
        return prefixes.places(found, layouts.LAYOUTS[part_config.names], layouts.SIGN[part_config.names], where)
    return {name: name for name in found}


def _parts(config: Any, model: Any) -> Iterator[tuple[str, Any, nnx.Module]]:
    """(part, config, module) of everything with weights of its own: the tower as the compressor wants it (a dual tower is
    two), and the llm."""
    if getattr(config, "tower", None) is not None:
        for tower in model.tower.towers if isinstance(model.tower, Dual) else [model.tower]:
            yield "tower", tower.cfg, tower
    if getattr(config, "llm", None) is not None:
        yield "llm", config.llm, model.llm


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(n): item for n, item in enumerate(value)}
    if isinstance(value, dict):
        here = [(path, value[IS])] if IS in value else []
        return here + [
            pair for key, item in value.items() if key != IS for pair in _flat(item, f"{path}.{key}" if path else key)
        ]
    return [(path, value)]
