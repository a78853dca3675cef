"""Reading an artifact's folder: whole, unchanged, and for the compressor that is asked for. tcjax.export writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tcjax.interop import names, tensors
from tcjax.record import file_hash

KIND = "tcjax compressor"


class ArtifactMismatch(ValueError):
    """The folder is not the artifact it says, or not the one that is asked for; the message names every difference."""


class Content(NamedTuple):
    """manifest: where it comes from. facts: compressor_config.json. published: tensors under their published names."""

    manifest: dict[str, Any]
    facts: dict[str, Any]
    published: names.Arrays


def read(folder: Path) -> Content:
    """The content of an artifact, every file checked against the manifest first.

    Raises:
        ArtifactMismatch: no artifact, or a file is missing or changed.
    """
    folder = Path(folder)
    if kind_of(folder) != KIND:
        raise ArtifactMismatch(f"{folder} is no {KIND} artifact: no manifest.json that says so.")
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = [
        name
        for name, digest in manifest["files"].items()
        if not (folder / name).is_file() or file_hash(folder / name) != digest
    ]
    if changed:
        raise ArtifactMismatch(f"{folder}: missing or not what was exported: {changed}; fetch or export it again.")
    facts = json.loads((folder / "compressor_config.json").read_text())
    return Content(manifest, facts, tensors.load(folder / "compressor.safetensors"))


def kind_of(folder: Path) -> str:
    """What a folder's manifest says that it is; "" without one."""
    try:
        return str(json.loads((Path(folder) / "manifest.json").read_text())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def check_same(found: dict, expected: dict, what: str) -> None:
    """ArtifactMismatch with one line per fact that differs."""
    differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if differing:
        lines = "\n".join(f"  {key}: {found.get(key)!r}, {expected.get(key)!r}" for key in differing)
        raise ArtifactMismatch(f"{what} differ:\n{lines}")
