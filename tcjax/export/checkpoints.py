"""A published checkpoint, whatever it is stored as: names and shapes first, and then only the tensors that are wanted.

Safetensors (one file, a folder, shards with an index) are read by their headers; of a 17 GB model only the shards with the
connector are opened. Pickles (.bin, .pt, .pth) need PyTorch and load with weights_only or not at all. No code of a
checkpoint is ever run: config.json is read as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from tcjax.interop.names import Arrays, Shapes

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Checkpoint(NamedTuple):
    """shapes: of every tensor by its published name. read: some of them. config: config.json beside, {} without one."""

    source: Path
    shapes: Shapes
    read: Callable[[Collection[str]], Arrays]
    config: dict[str, Any]


def open_checkpoint(source: Path) -> Checkpoint:
    """A file, or a folder of them.

    Raises:
        ValueError: nothing there, no weights, cut short, more than tensors in a pickle, or PyTorch missing for one.
    """
    files = _files(source)
    shapes: Shapes = {}
    of_file: dict[Path, list[str]] = {}
    pickled: Arrays = {}
    for file in files:
        found = _pickle(file) if file.suffix in PICKLES else None
        pickled |= found or {}
        there = _header(file) if found is None else {name: array.shape for name, array in found.items()}
        twice = sorted(shapes.keys() & there.keys())
        if twice:
            raise ValueError(f"{file} repeats {twice[:3]} of another file; name the file that is meant.")
        shapes |= there
        of_file[file] = list(there)

    def read(wanted: Collection[str]) -> Arrays:
        arrays: Arrays = {}
        for file, there in of_file.items():
            mine = [name for name in there if name in wanted]
            if mine and file.suffix in PICKLES:
                arrays |= {name: pickled[name] for name in mine}
            elif mine:
                with safe_open(file, framework="np") as opened:
                    arrays |= {name: opened.get_tensor(name) for name in mine}
        return arrays

    return Checkpoint(source, shapes, read, _config(source))


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; expected a checkpoint: a folder, a .safetensors or a .bin file.")
    for name in INDICES:
        if (source / name).is_file():
            shards = set(json.loads((source / name).read_text())["weight_map"].values())
            missing = sorted(shard for shard in shards if not (source / shard).is_file())
            if missing:
                raise ValueError(f"{source / name} lists {missing}, which are not there; fetch them.")
            return [source / shard for shard in sorted(shards)]
    for suffixes in ((".safetensors",), PICKLES):
        found = sorted(path for path in source.iterdir() if path.suffix in suffixes and path.is_file())
        if found:
            return found
    raise ValueError(f"{source} holds neither *.safetensors nor {', '.join('*' + suffix for suffix in PICKLES)}.")


def _header(file: Path) -> Shapes:
    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  no Mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); fetch or write it again.") from error


def _pickle(file: Path) -> dict[str, np.ndarray]:
    try:
        from tcjax.export.torch.formats import pickled
    except ImportError as error:
        raise ValueError(
            f"{file} is a torch pickle, and PyTorch is not installed: pip install 'tcjax[torch]', or convert it to "
            f"safetensors."
        ) from error
    return pickled.load(file)


def _config(source: Path) -> dict[str, Any]:
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    return found if isinstance(found, dict) else {}
