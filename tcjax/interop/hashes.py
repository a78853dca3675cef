"""Content hashes that are remembered, so that a second start does not read a checkpoint again to know who it is.

    folder/<key of the path>.json      {"path", "files": [[name, bytes, time of last change in ns], ...], "content_hash"}

A hash is believed while every file has the size and the time of change that it was computed at.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tcjax.interop import tensors
from tcjax.record import write_json


def content_hash(path: Path, folder: Path) -> str:
    """`tensors.content_hash` of a safetensors file or a folder of them, from `folder` if it is known there."""
    path = path.resolve()
    facts: dict[str, Any] = {"path": str(path), "files": _files(path)}
    memory = folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    known = _read(memory)
    if {key: known.get(key) for key in facts} == facts and isinstance(known.get("content_hash"), str):
        return known["content_hash"]
    found = tensors.content_hash(path)
    if _files(path) == facts["files"]:  # nobody wrote meanwhile
        write_json(memory, facts | {"content_hash": found})
    return found


def _files(path: Path) -> list[list]:
    files = sorted({stored.file for stored in tensors.find(path).values()})
    if path.is_dir() and (path / tensors.INDEX).is_file():
        files.append(path / tensors.INDEX)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _read(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
