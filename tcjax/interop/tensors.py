"""The only door to safetensors files: reads published ones, writes ours so that nothing can be silently wrong in them.

safetensors 0.8.0 writes the raw memory of a numpy array: a transposed, strided or Fortran-ordered view lands on disk
with the right shape and wrong values, without an error. `save` copies to C order first, reads back and compares bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file that PyTorch loads (format=pt), whole or not at all: beside the old one, then in its place.

    Raises:
        OSError: the disk does not hold what was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: _native(array) for name, array in arrays.items()}
    dense = {name: np.array(array, order="C") for name, array in arrays.items()}
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        save_file(dense, beside, metadata={"format": "pt", **(metadata or {})})
        beside.chmod(0o644)  # safetensors makes it readable for its writer alone
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        read = load(beside)
        wrong = [name for name in arrays if not _same_bits(read.get(name), arrays[name])]
        if wrong or len(read) != len(arrays):
            raise OSError(f"{path}: what was read back differs from what was written in {wrong}; the old file stays.")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, or of a folder's shards (by its index if it has one), in its own type.

    Raises:
        ValueError: the path does not exist, is no safetensors file, or is cut short; the message names the file.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    for shard in _shards(path):
        try:
            with safe_open(shard, framework="np") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no Mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shard} is no whole safetensors file ({error}); fetch or write it again.") from error
        twice = sorted(arrays.keys() & found.keys())
        if twice:
            raise ValueError(f"{shard} repeats {twice[:3]} of another shard; keep one copy, or an {INDEX}.")
        arrays |= found
    return arrays


def metadata(path: Path) -> dict[str, str]:
    """The strings a file carries beside its tensors."""
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def content_hash(weights: Mapping[str, np.ndarray] | Path) -> str:
    """SHA-256 over names, types, shapes and bytes, 64 hex digits; the same for a dict and any file that holds it."""
    arrays = weights if isinstance(weights, Mapping) else load(weights)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name]).reshape(np.shape(arrays[name]))
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _native(array: np.ndarray) -> np.ndarray:
    """The same values in this machine's byte order; safetensors names types without one."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _same_bits(read: np.ndarray | None, meant: np.ndarray) -> bool:
    """Against the caller's own array, not our copy of it; by bits, so that NaN equals itself and -0 is not 0."""
    if read is None or read.dtype != meant.dtype or read.shape != meant.shape:
        return False
    bits = np.dtype(f"u{read.dtype.itemsize}")
    return np.array_equal(read.view(bits), np.array(meant, order="C").view(bits))


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; expected a safetensors file, or a folder of them.")
    index = path / INDEX
    if index.is_file():
        return sorted({path / shard for shard in json.loads(index.read_text())["weight_map"].values()})
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{path} holds no *.safetensors; pickled weights are not read, convert them first.")
    return shards
