"""From a model's config to a model with its weights, and the facts by which a checkpoint knows its frozen neighbours again.

Tower and LLM are read from safetensors under their published names (each file's NAMES table). A part started by
`TrainConfig.weights` is read under our own leaf paths. Parts without weights start from the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import nnx

from tcjax.interop import names, tensors
from tcjax.llms import decoder
from tcjax.llms.decoder import LlmConfig
from tcjax.record import IS, to_dict
from tcjax.towers import vit
from tcjax.towers.vit import VitConfig


def assemble(
    config: Any, *, root: Path, seed: int = 0, start: dict[str, str] | None = None
) -> tuple[nnx.Module, dict[str, Any]]:
    """Build `config`, fill in the weights, and say who it is.

    Args:
        config: of a model whose tower, llm and compressor are fields of the same names (any may be missing).
        start: {part: safetensors under our leaf paths}, to begin training from.

    Returns:
        The model and its identity {fact: value}: every field of the config, and the content hash of each weights file.

    Raises:
        ValueError: a file is missing, cut short, or does not fit (every name and shape that differs is listed).
    """
    model = config.build(nnx.Rngs(seed))
    identity = {f"model.{fact}": value for fact, value in _flat(to_dict(config)) if not fact.endswith("weights")}
    for part in ("tower", "llm"):
        part_config = getattr(config, part, None)
        weights = getattr(part_config, "weights", "")
        if weights:
            path = root / weights
            arrays = tensors.load(path)
            module = getattr(model, part)
            table, ignored = published_names(part_config)
            names.assign(module, names.from_torch(arrays, table, names.shapes(module), ignore=ignored))
            identity[f"{part}.weights"] = tensors.content_hash(arrays)
        elif part_config is not None:
            identity[f"{part}.weights"] = f"random from seed {seed}"
    for part, path in (start or {}).items():
        if not hasattr(model, part):
            raise ValueError(f"weights names {part!r}, which is no part of {type(model).__name__}.")
        names.assign(
            getattr(model, part), names.matching(tensors.load(root / path), names.shapes(getattr(model, part)))
        )
    return model, identity


def published_names(part_config: Any) -> tuple[list[names.Name], list[str]]:
    """The NAMES table of a tower or an LLM, and patterns of the published tensors it has no use for."""
    room = {VitConfig: vit, LlmConfig: decoder}[type(part_config)]
    return room.names(part_config), room.ignore(part_config)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        here = [(path, value[IS])] if IS in value else []
        return here + [
            pair for key, item in value.items() if key != IS for pair in _flat(item, f"{path}.{key}" if path else key)
        ]
    return [(path, value)]
