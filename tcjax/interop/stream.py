"""From safetensors straight to shards: a device gets its piece of a leaf, and nobody ever holds a whole model.

    piece of a leaf = cast(stack over layers(op(published tensor)[index]))      the table's line says which tensors and op

A piece is filled block by block from a map of the file, so a process touches the bytes that its own devices need, and the
host holds one piece at a time: memory peaks at the shards themselves plus what of one tensor is mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tcjax.interop.names import OPS, Name
from tcjax.interop.tensors import Stored

_BLOCK = 1 << 23  # bytes copied at a time
_ALIGNED = 64  # XLA's CPU backend takes such memory as it is instead of copying it

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Place:
    """Where a leaf goes and as what: its whole shape over all processes, its type, its sharding.

    owned: it may be donated, so its memory must be XLA's own.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding
    owned: bool = False


def leaf(name: Name, stored: Mapping[str, Stored], place: Place) -> jax.Array:
    """The leaf of a line of the table (not one with a `value`), from tensors by published name."""
    pieces: dict[tuple, tuple[Index, list[Any]]] = {}
    for device, index in place.sharding.addressable_devices_indices_map(place.shape).items():
        assert index is not None
        key = tuple(part.indices(size) for part, size in zip(index, place.shape, strict=True))
        pieces.setdefault(key, (index, []))[1].append(device)
    arrays: list[jax.Array] = []
    for index, devices in pieces.values():
        host = read(name, stored, place.shape, index, place.dtype)
        # device_put may go on reading after it returns; the next piece is made when this one has left.
        arrays += jax.block_until_ready([jax.device_put(host, device, may_alias=not place.owned) for device in devices])
        del host
    return jax.make_array_from_single_device_arrays(place.shape, place.sharding, arrays)


def read(name: Name, stored: Mapping[str, Stored], shape: tuple[int, ...], index: Index, dtype: Any) -> np.ndarray:
    """The piece `index` of a leaf as C-contiguous numpy."""
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
    piece, to_jax = _empty(sizes, np.dtype(dtype)), OPS[name.op].to_jax
    if not name.is_stacked:
        _fill(piece, to_jax(stored[name.torch].mapped())[index])
        return piece
    for row, layer in enumerate(range(*index[0].indices(shape[0]))):
        _fill(piece[row], to_jax(stored[name.at(layer)].mapped())[index[1:]])
    return piece


def _fill(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view, whose memory is a file: blocks are first copied in the file's own order, page after page."""
    for block in _blocks(view):
        out[block] = np.array(view[block], order="K")


def _blocks(view: np.ndarray) -> Iterator[Index]:
    """Slices along the axis that is outermost in memory, each of about `_BLOCK` bytes."""
    if view.ndim == 0 or view.size == 0:
        yield ()
        return
    outer = int(np.argmax(np.abs(view.strides)))
    rows = max(1, _BLOCK * view.shape[outer] // view.nbytes)
    for start in range(0, view.shape[outer], rows):
        yield (*[slice(None)] * outer, slice(start, start + rows))


def _empty(sizes: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that XLA's CPU backend can take over."""
    num_bytes = int(np.prod(sizes, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + num_bytes].view(dtype).reshape(sizes)
