"""What a path in a config stands for, as a hash that changes when the content does: files, artifacts, datasets.

    content(root, "a.json")                SHA-256 of the file's bytes, up to 2 GiB
    content(root, "checkpoints/x")         of a folder, of its prepared datasets, its manifest.json or its tokenizer's files
    dataset(root, "mixture.yaml")          of the mixture and of every conversation file it names
    dataset(root, "shard-{000..099}.tar")  of each file; beyond 2 GiB of its size, modification time and both ends
    dataset(root, "data/boards")           of a folder: its dataset_info.json or records.json, which hold sizes and hashes of
                                           the rest; or of the tars or parquet files in it

"" is no path, or a folder of anything else. Image files below `Source.images` are taken to be what was published: whoever
replaces some of them in place gives their folder another name, or prepares the source, which hashes every byte. A large
file's time of modification makes an untouched copy look new; the other way round, changed bytes looking old, would train
on stale features.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from glob import escape, glob
from pathlib import Path

import yaml

WHOLE = 2 << 30  # bytes up to which a file is read from end to end: mix665k's JSON has 1.0 GB

_END = 1 << 20

_SHARDS = ("*.tar", "*.parquet")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content(root: Path, text: str) -> str:
    """64 hex digits of a file, a prepared dataset or an artifact below `root`; "" for any other text."""
    path = root / text
    if not text or not path.exists():
        return ""
    if path.is_file():
        return _file(path)
    # Names, sizes and record counts of every shard; of an artifact, the hash of every file; of a checkpoint, its tokenizer.
    facts = sorted(path.glob("prepared/**/dataset_info.json")) or sorted(path.glob("manifest.json"))
    facts = facts or sorted(path.glob("*token*"))
    return _joined(map(file_hash, facts))


def dataset(root: Path, text: str) -> str:
    """64 hex digits of everything that the path of a `Source` means, but for loose image files; "" if nothing is there."""
    path = root / text
    if path.is_file():
        return _mixture(root, path) if path.suffix in (".yaml", ".yml") else _file(path)
    if not path.is_dir():
        # Every file that the braces could mean: one too many is only too careful.
        counted = sorted(map(Path, glob(re.sub(r"\{[^{}]*\}", "*", escape(str(path)))))) if "{" in text else []
        return _joined(f"{file.name} {_file(file)}" for file in counted)
    known = content(root, text) or _joined(map(file_hash, path.glob("records.json")))
    if known:
        return known
    if facts := sorted(path.rglob("dataset_info.json")):
        return _joined(map(file_hash, facts))
    shards = [shard for pattern in _SHARDS for shard in sorted(path.rglob(pattern))]
    return _joined(f"{shard.relative_to(path)} {_file(shard)}" for shard in shards)


def _file(path: Path) -> str:
    about = path.stat()
    if about.st_size <= WHOLE:
        return file_hash(path)
    with path.open("rb") as file:
        first = file.read(_END)
        file.seek(-_END, 2)
        last = file.read(_END)
    known = f"{about.st_size} {about.st_mtime_ns} ".encode()
    return hashlib.sha256(known + hashlib.sha256(first).digest() + hashlib.sha256(last).digest()).hexdigest()


def _mixture(root: Path, path: Path) -> str:
    """A YAML file, and every file it names."""
    try:
        entries = yaml.safe_load(path.read_text())["datasets"]
        names = [entry["json_path"] for entry in entries]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return file_hash(path)  # the reader refuses it, with a reason
    parts = [file_hash(path)]
    for name in map(str, names):
        found = next((place for place in (path.parent / name, root / name) if place.is_file()), None)
        parts.append(_file(found) if found else "missing")
    return _joined(parts)


def _joined(parts: Iterable[str]) -> str:
    text = "\n".join(parts)
    return hashlib.sha256(text.encode()).hexdigest() if text else ""
