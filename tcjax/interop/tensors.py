"""The only door to safetensors files: reads published ones, writes ours so that nothing can be silently wrong in them.

    find(path)     {name: Stored}: what lies where, known from headers alone; nothing is read until someone asks for a piece
    load(path)     {name: array}: everything, for files that are small
    save(path, arrays)

safetensors 0.8.0 writes the raw memory of a numpy array: a transposed, strided or Fortran-ordered view lands on disk
with the right shape and wrong values, without an error. `save` copies to C order first, reads back and compares bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"

_DTYPES = {
    "BOOL": np.bool_,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_DTYPES |= {f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)}
_DTYPES |= {f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
_BLOCK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file: its type, its shape and the byte at which it begins."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def mapped(self) -> np.ndarray:
        """The tensor as a read-only map of the file: memory holds what is looked at, until the map is dropped."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape).view(np.ndarray)


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


def find(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, or of a folder's shards (by its index if it has one). Reads headers only.

    Raises:
        ValueError: the path does not exist, holds no safetensors, lacks a shard or a tensor that its index names, or a file
            is cut short; the message names the file.
    """
    path = Path(path)
    found: dict[str, Stored] = {}
    shards, index = _shards(path)
    for shard in shards:
        here = _header(shard)
        twice = sorted(found.keys() & here.keys())
        if twice:
            raise ValueError(f"{shard} repeats {twice[:3]} of another shard; keep one copy, or an {INDEX}.")
        found |= here
    lost = sorted(name for name, shard in index.items() if name not in found or found[name].file != shard)
    if lost:
        first = ", ".join(f"{name} in {index[name].name}" for name in lost[:3])
        raise ValueError(
            f"{path / INDEX} names {len(lost)} of its {len(index)} tensors where they are not: {first}"
            f"{' ...' if len(lost) > 3 else ''}; index and shards are of two downloads, fetch them again."
        )
    return found


def load(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file or folder, in its own type and in memory; raises as `find` does."""
    return {name: np.array(stored.mapped()) for name, stored in find(path).items()}


def metadata(path: Path) -> dict[str, str]:
    """The strings a file carries beside its tensors."""
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def content_hash(weights: Mapping[str, np.ndarray] | Path) -> str:
    """SHA-256 over names, types, shapes and bytes, 64 hex digits; the same for a dict and any file that holds it.

    A file is read tensor by tensor, a block at a time.
    """
    arrays = weights if isinstance(weights, Mapping) else find(weights)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        array = array.mapped() if isinstance(array, Stored) else np.ascontiguousarray(array).reshape(np.shape(array))
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        content = array.reshape(-1).view(np.uint8)
        for start in range(0, len(content), _BLOCK):
            digest.update(content[start : start + _BLOCK].data)
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


def _shards(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of a checkpoint, and where its index says that each tensor is ({} without one)."""
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; expected a safetensors file, or a folder of them.")
    index = path / INDEX
    if index.is_file():
        named = _index(index)
        shards = sorted(set(named.values()))
        lost = [shard.name for shard in shards if not shard.is_file()]
        if lost:
            raise ValueError(
                f"{path} lacks {len(lost)} of the {len(shards)} shards that its {INDEX} names: {', '.join(lost[:5])}"
                f"{' ...' if len(lost) > 5 else ''}; the download is not whole, fetch them."
            )
        return shards, named
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{path} holds no *.safetensors; pickled weights are not read, convert them first.")
    return shards, {}


def _index(path: Path) -> dict[str, Path]:
    try:
        named = json.loads(path.read_text())["weight_map"]
        outside = [shard for shard in named.values() if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors shards ({error!r}); fetch it again.") from error
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}; a shard lies in the folder of its index.")
    return {name: path.parent / shard for name, shard in named.items()}


def _header(file: Path) -> dict[str, Stored]:
    """What a file says it holds, once safetensors agrees that it holds it: 8 bytes of length, JSON, then the tensors."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); fetch or write it again.") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    unknown = sorted({facts["dtype"] for facts in header.values()} - _DTYPES.keys())
    if unknown:
        raise ValueError(f"{file} holds tensors of the types {unknown}; what is read is {sorted(_DTYPES)}.")
    return {
        name: Stored(
            file, np.dtype(_DTYPES[facts["dtype"]]), tuple(facts["shape"]), 8 + length + facts["data_offsets"][0]
        )
        for name, facts in sorted(header.items())
    }
