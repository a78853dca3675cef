"""An export is one folder with a manifest: written beside its place, renamed when it is whole, never over something else.

with fresh(out, kind) as building:
    ...                                     # files below `building`
    seal(building, kind, {"run": ...})      # manifest.json: the facts, and SHA-256 of every file
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tcjax.interop.artifact import kind_of
from tcjax.record import file_hash

MANIFEST = "manifest.json"


@contextlib.contextmanager
def fresh(out: Path, kind: str) -> Iterator[Path]:
    """An empty folder that takes the place of `out` when the block ends without an error.

    Raises:
        ValueError: `out` is a file, or holds something else than an earlier export of this kind.
    """
    out = Path(out)
    _refuse_foreign(out, kind)
    building = out.with_name(f".{out.name}.{os.getpid()}.writing")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        _publish(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def seal(building: Path, kind: str, facts: Mapping[str, Any]) -> dict:
    """Write the manifest of a finished folder and return it."""
    paths = sorted(path for path in building.rglob("*") if path.is_file())
    files = {path.relative_to(building).as_posix(): file_hash(path) for path in paths}
    manifest = {"kind": kind, **facts, "files": files}
    (building / MANIFEST).write_text(to_json(manifest))
    return manifest


def to_json(value: dict) -> str:
    return json.dumps(value, indent=1) + "\n"


def _refuse_foreign(out: Path, kind: str) -> None:
    if out.is_dir() and any(out.iterdir()) and kind_of(out) != kind:
        raise ValueError(f"{out} holds something else than a {kind} and stays as it is; choose a new folder.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; an export is a folder.")


def _publish(building: Path, out: Path) -> None:
    """Put the finished folder in its place; an earlier export goes only when the new one is whole."""
    earlier = out.with_name(f".{out.name}.{os.getpid()}.earlier")
    if out.exists():
        out.rename(earlier)
    building.rename(out)
    shutil.rmtree(earlier, ignore_errors=True)
