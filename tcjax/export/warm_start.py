"""A published PyTorch connector as an artifact, from which training starts: `TrainConfig.weights = {"compressor": FOLDER}`.

    imported = import_artifact(Path("llava-v1.5-7b"), Path("llava_projector"), grid_HW=(24, 24))

The layout is known by its names (tcjax.export.publishers), nothing is guessed: a missing, unexpected or misshapen tensor
is an error that lists all of them. What a publisher has no tensor for (OpenFlamingo's perceiver has no layer to an LLM)
starts as in a new compressor, and the manifest says which, and what share of the parameters came from the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tcjax.compressors.base import Widths
from tcjax.export.artifact import export
from tcjax.export.checkpoints import Checkpoint, open_checkpoint
from tcjax.export.publishers import PUBLISHERS, Publisher
from tcjax.interop import names, tensors


class Imported(NamedTuple):
    """publisher: whose layout it was. share: of the parameters that came from the file. fresh: tensors that did not."""

    publisher: str
    config: Any
    widths: Widths
    share: float
    fresh: list[str]


def import_artifact(
    source: Path,
    out: Path,
    *,
    grid_HW: tuple[int, int] | None = None,
    llm_D: int = 0,
    num_queries: int = 0,
    family: str = "",
    seed: int = 0,
) -> Imported:
    """Write the artifact of the compressor that a checkpoint holds.

    Args:
        source: a folder or file of weights; config.json beside them is read if there is one.
        grid_HW: the tower's tokens, where config.json does not say them.
        llm_D: the LLM's width, where the checkpoint has no layer to an LLM.
        num_queries: where neither weights nor config.json know it.
        family: whose layout it is, where several fit.
        seed: for what the checkpoint does not hold.

    Raises:
        ValueError: an unknown layout, a fact that is missing, or tensors that do not fit (all of them are listed).
    """
    checkpoint = open_checkpoint(Path(source))
    publisher = _publisher(checkpoint, family)
    keys = publisher.keys(checkpoint.shapes)
    said = checkpoint.config | ({"num_query_tokens": num_queries, "projector_config": None} if num_queries else {})
    found = publisher.infer({key: checkpoint.shapes[name] for name, key in keys.items()}, said)
    if found.llm_D is None and not llm_D:
        raise ValueError(f"{source} ({publisher.name}) has no layer to an LLM; --llm-width says how wide it shall be.")
    grid_HW = grid_HW or _grid(checkpoint)
    D = found.llm_D or llm_D
    widths = Widths(grid_HW=grid_HW, vision_C=found.vision_C, llm_D=D, text_D=D)
    config = found.config(widths.num_tokens)
    widths = config.asked(widths)
    module = config.build(widths, nnx.Rngs(seed))
    table, shapes = config.names(widths), names.shapes(module)
    start = names.to_torch(names.flatten(module), table)
    read = {keys[name]: _float32(array) for name, array in checkpoint.read(keys).items()}
    fresh = [key for key in start if key not in read and any(re.fullmatch(p, key) for p in publisher.fresh)]
    arrays = names.from_torch(read | {key: start[key] for key in fresh}, table, shapes, ignore=publisher.ignore)
    names.assign(module, arrays)
    share = 1 - sum(start[key].size for key in fresh) / sum(array.size for array in start.values())
    origin = {
        "imported_from": str(Path(source).resolve().name),
        "layout": publisher.name,
        "content_hash": tensors.content_hash(read),
        "share_of_parameters": share,
        "fresh": fresh,
        "vision": _named(checkpoint.config, "mm_vision_tower", "vision_config"),
        "llm": _named(checkpoint.config, "_name_or_path", "text_config"),
    }
    export(module, config, widths, out, provenance=origin)
    return Imported(publisher.name, config, widths, share, fresh)


def _publisher(checkpoint: Checkpoint, family: str) -> Publisher:
    known = sorted({publisher.family for publisher in PUBLISHERS})
    if family and family not in known:
        raise ValueError(f"--family {family!r} has no published layout; choose one of {', '.join(known)}.")
    fitting = [publisher for publisher in PUBLISHERS if publisher.is_in(checkpoint.shapes)]
    chosen = [publisher for publisher in fitting if not family or publisher.family == family]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        both = ", ".join(f"{publisher.name} ({publisher.family})" for publisher in chosen)
        raise ValueError(f"{checkpoint.source} fits several layouts: {both}; --family says which is meant.")
    if fitting:
        raise ValueError(f"{checkpoint.source} is not of {family} but of {', '.join(p.family for p in fitting)}.")
    some = ", ".join(sorted(checkpoint.shapes)[:5])
    rows = "".join(f"\n  {publisher.name} ({publisher.family}): {publisher.prefix}" for publisher in PUBLISHERS)
    raise ValueError(f"{checkpoint.source} holds no connector that is known ({some}, ...). These are:{rows}")


def _grid(checkpoint: Checkpoint) -> tuple[int, int]:
    """The tower's token grid as config.json has it: sizes, or a CLIP's or SigLIP's name with both numbers in it."""
    vision: dict[str, Any] = checkpoint.config.get("vision_config") or {}
    sides, patches = _two(vision.get("image_size")), _two(vision.get("patch_size"))
    name = re.search(r"patch(\d+)-(\d+)", str(checkpoint.config.get("mm_vision_tower", "")))
    if name:
        patches, sides = _two(int(name[1])), _two(int(name[2]))
    if min(*sides, *patches) > 0:
        return sides[0] // patches[0], sides[1] // patches[1]
    raise ValueError(f"{checkpoint.source} does not say the tower's token grid; give it: --grid 24x24.")


def _two(value: Any) -> tuple[int, int]:
    """A size or a pair of them; (0, 0) for anything else."""
    pair = tuple(value) if isinstance(value, list) else (value, value)
    return pair if len(pair) == 2 and all(isinstance(side, int) for side in pair) else (0, 0)


def _named(config: dict[str, Any], *fields: str) -> Any:
    """The first field there is, without its long lists."""
    for field in fields:
        value = config.get(field)
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if isinstance(item, str | int | float | bool)}
        if value:
            return value
    return "unknown"


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32, copy=False)
