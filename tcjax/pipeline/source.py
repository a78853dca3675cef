"""A `Source` of the mixture -> its `Records`: the format decides who reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tcjax.config import Source
from tcjax.pipeline.readers.prepared import BrokenShard, open_prepared
from tcjax.pipeline.sample import Record, Records, Turn

__all__ = ["BrokenShard", "Record", "Records", "Turn", "open_source"]

READERS: dict[str, Callable[[Path, Source], Records]] = {"prepared": open_prepared}


def open_source(root: Path, source: Source) -> Records:
    """Random access to a source. `source.format` says who reads it; "" follows from the path.

    Raises:
        ValueError: the path, the split or the format is unknown.
        BrokenShard: a shard is missing or cut short.
    """
    kind = source.format or _guess(root / source.path)
    if kind not in READERS:
        raise ValueError(f"Source.format={kind!r} is unknown; possible: {sorted(READERS)}.")
    return READERS[kind](root, source)


def _guess(path: Path) -> str:
    """The format that a path's suffix, or what lies in its folder, speaks for."""
    return "prepared"
