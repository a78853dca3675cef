"""Records of any source, stored as ArrayRecord: what `tcjax data prepare SOURCE --out DIR` writes.

    DIR/records.json                 {"records": n, "shards": [{"file", "records", "bytes", "sha256"}], "source": ..., ...}
    DIR/00000-of-00012.array_record  one record each: uint32 length of the head | head as JSON | images' bytes end to end

The head holds image_id, turns, fields and the images' lengths. It opens at once, whatever its size; a read is one checksummed
access to one file and gives the original record again, arrays and bytes among its fields included. records.json is written
last: a folder that has it is whole.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled

from tcjax.config import Source
from tcjax.pipeline.sample import BrokenShard, Record, Turn

MANIFEST = "records.json"

VERSION = 1


def pack(record: Record) -> bytes:
    """A record as bytes."""
    head = {
        "id": record.image_id,
        "turns": [list(turn) for turn in record.turns],
        "images": [len(image) for image in record.images],
        "fields": {name: _plain(value) for name, value in record.fields.items()},
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join([struct.pack("<I", len(text)), text, *record.images])


def unpack(packed: bytes) -> Record:
    """The inverse of `pack`."""
    (length,) = struct.unpack_from("<I", packed)
    head, images, at = json.loads(packed[4 : 4 + length]), [], 4 + length
    for size in head["images"]:
        images.append(packed[at : at + size])
        at += size
    turns = [Turn(*turn) for turn in head["turns"]]
    return Record(tuple(images), head["id"], turns, {name: _rich(value) for name, value in head["fields"].items()})


class Stored:
    """Random access to a folder of stored records."""

    def __init__(self, folder: Path):
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} holds no {MANIFEST}; run: tcjax data prepare SOURCE --out {folder}")
        facts = json.loads(path.read_text())
        if facts.get("version") != VERSION:
            raise ValueError(f"{path} is of version {facts.get('version')!r}; this tcjax reads {VERSION}.")
        self.folder, self.split, self.facts = folder, "train", facts
        self.name, self._label_names = f"{facts['name']}:{facts['split']}", tuple(facts["label_names"])
        self._shards = [folder / shard["file"] for shard in facts["shards"]]
        for shard, promised in zip(self._shards, facts["shards"], strict=True):
            held = shard.stat().st_size if shard.is_file() else None
            if held != promised["bytes"]:
                state = "missing" if held is None else f"damaged: {held} of {promised['bytes']} bytes"
                raise BrokenShard(f"shard {shard} is {state}; remove {folder} and prepare it again.")
        self._ends = np.cumsum([shard["records"] for shard in facts["shards"]])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        at = index - int(self._ends[shard]) + self.facts["shards"][shard]["records"]
        try:
            return unpack(self._reader(shard).read([at])[0])
        except (RuntimeError, IndexError, struct.error) as error:
            raise BrokenShard(f"record {index} is damaged in {self._shards[shard]}: {error}") from error

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                reader = array_record_module.ArrayRecordReader(
                    str(self._shards[shard]), options="readahead_buffer_size:0"
                )
                self._readers[shard] = reader
            return self._readers[shard]

    def __del__(self):
        for reader in getattr(self, "_readers", {}).values():
            with contextlib.suppress(RuntimeError):
                reader.close()


def open_stored(root: Path, source: Source) -> Stored:
    return Stored(root / source.path)


def _plain(value: Any) -> Any:
    """JSON types; arrays and bytes become {"array" or "bytes": base64, ...}."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return {"objects": [_plain(item) for item in value.reshape(-1).tolist()], "shape": list(value.shape)}
    if isinstance(value, np.ndarray | np.generic):
        whole = np.ascontiguousarray(value).reshape(np.shape(value))
        text = base64.b64encode(whole.tobytes()).decode()
        return {"array": text, "dtype": whole.dtype.str, "shape": list(whole.shape)}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {"dict": {name: _plain(item) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)  # dates and the like, of which a parquet file has some


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return [_rich(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {name: _rich(item) for name, item in value["dict"].items()}
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    if "objects" in value:
        whole = np.empty(len(value["objects"]), object)
        whole[:] = [_rich(item) for item in value["objects"]]
        return whole.reshape(value["shape"])
    content = np.frombuffer(base64.b64decode(value["array"]), np.dtype(value["dtype"]))
    return content.reshape(value["shape"]).copy() if value["shape"] else content[0]
