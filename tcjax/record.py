"""A resolved config as plain JSON and back, and its fingerprint: what `run.json` holds and a study skips by.

Every dataclass becomes {"is": "module:Class", fields...}; reading one back names unknown fields beside the valid ones and
imports nothing but tcjax and what the caller has imported already. The fingerprint covers the bytes of every file a config
names (weights, tokenizer, prepared dataset), so a retrained base is another run.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tcjax.identity import content, dataset, file_hash

__all__ = ["file_hash", "fingerprint", "from_dict", "to_dict", "unfinished", "write_json"]

IS = "is"
SOURCE = "tcjax.config:Source"


def to_dict(value: Any) -> Any:
    """Dataclasses, tuples, dicts and scalars as JSON types. TypeError for anything else: a config holds only choices."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {IS: f"{type(value).__module__}:{type(value).__qualname__}"} | fields
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_dict(v) for k, v in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(
        f"a config may hold dataclasses, tuples, dicts, strings and numbers, not {type(value).__name__}: {value!r}"
    )


def from_dict(value: Any, where: str = "run.json") -> Any:
    """The inverse of `to_dict`; lists come back as tuples. ValueError names an unknown class or field."""
    if isinstance(value, list):
        return tuple(from_dict(v, where) for v in value)
    if not isinstance(value, dict):
        return value
    if IS not in value:
        return {k: from_dict(v, where) for k, v in value.items()}
    cls = _class(value[IS], where)
    fields = {k: from_dict(v, where) for k, v in value.items() if k != IS}
    valid = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: {cls.__qualname__} has no field {name!r}; valid fields: {valid}.{hint}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in fields and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {cls.__qualname__} lacks {missing}, which have no default.")
    return cls(**fields)


def _class(path: str, where: str) -> type:
    module, _, name = path.partition(":")
    if module.partition(".")[0] == "tcjax":
        importlib.import_module(module)
    cls = getattr(sys.modules.get(module), name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{where}: {path!r} is not a config class of tcjax or of a module that is imported already.")
    return cls


def write_json(path: Path, value: Any) -> None:
    """Atomically: the old file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def unfinished(path: Path) -> Path:
    """Where a file is written before it gets its name: a place that no other process, here or on another host, writes."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.writing")


def fingerprint(config: Any, root: Path) -> str:
    """16 hex digits over the resolved config and the content of every file or dataset it names below `root`."""
    resolved = to_dict(config)
    contents = {text: digest for text in sorted(set(_strings(resolved))) if (digest := content(root, text))}
    sources = {text: digest for text in sorted(set(_sources(resolved))) if (digest := dataset(root, text))}
    text = json.dumps([resolved, contents | sources], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in (IS, "name") and value.get(IS) != SOURCE:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _sources(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value.get(IS) == SOURCE:
        yield value["path"]
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _sources(item)
