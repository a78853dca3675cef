"""A `Source` of the mixture -> its `Records`: the format decides who reads it.

| format | path | reader |
|---|---|---|
| prepared | a dataset folder, or a TFDS one | readers/prepared.py |
| records | a folder with records.json, from `tcjax data prepare SOURCE --out DIR` | readers/stored.py |
| llava | .json, .jsonl | readers/llava.py |
| mixture | .yaml, .yml | readers/mixture.py |
| webdataset | .tar, a folder of them, "shard-{000..012}.tar" | readers/web_dataset.py |
| parquet | .parquet, a folder of them | readers/parquet.py |

Whatever the format, `Source.sampling` may keep some of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tcjax.config import Source
from tcjax.pipeline.readers.files import expand
from tcjax.pipeline.readers.llava import open_llava
from tcjax.pipeline.readers.mixture import open_mixture
from tcjax.pipeline.readers.parquet import open_parquet
from tcjax.pipeline.readers.picked import picked
from tcjax.pipeline.readers.prepared import open_prepared
from tcjax.pipeline.readers.stored import MANIFEST, open_stored
from tcjax.pipeline.readers.web_dataset import open_web_dataset
from tcjax.pipeline.sample import BadSample, BrokenShard, Record, Records, Turn

__all__ = ["BadSample", "BrokenShard", "Record", "Records", "Turn", "format_of", "open_source"]

READERS: dict[str, Callable[[Path, Source], Records]] = {
    "prepared": open_prepared,
    "records": open_stored,
    "llava": open_llava,
    "mixture": open_mixture,
    "webdataset": open_web_dataset,
    "parquet": open_parquet,
}

SUFFIXES = {
    ".json": "llava",
    ".jsonl": "llava",
    ".yaml": "mixture",
    ".yml": "mixture",
    ".tar": "webdataset",
    ".parquet": "parquet",
}

_SPLIT = ("prepared", "parquet")  # formats whose files say which split they are of


def open_source(root: Path, source: Source) -> Records:
    """Random access to a source.

    Raises:
        ValueError: the path, the split, the sampling or the format is unknown.
        BrokenShard: a file is missing or cut short.
    """
    kind = format_of(root, source)
    if kind not in READERS:
        raise ValueError(f"Source.format={kind!r} is unknown; possible: {sorted(READERS)}.")
    if source.split != "train" and kind not in _SPLIT:
        raise ValueError(
            f"{source.path} ({kind}) has no splits, got {source.split!r}; Source.sampling keeps some rows."
        )
    if source.min_rating and kind != "parquet":
        raise ValueError(f"Source.min_rating={source.min_rating}: {source.path} ({kind}) has no ratings; parquet may.")
    return picked(READERS[kind](root, source), source.sampling, source.seed)


def format_of(root: Path, source: Source) -> str:
    """`source.format`, or what the file's suffix or the folder's content speaks for."""
    path = root / source.path
    if source.format:
        return source.format
    if not path.is_dir():
        suffix = (path if path.exists() else Path(expand(source.path)[0])).suffix
        return SUFFIXES.get(suffix, "prepared" if not suffix else f"of a {suffix} file")
    if (path / MANIFEST).is_file():
        return "records"
    if next(path.rglob("dataset_info.json"), None) or next(path.glob("*_dataset_builder.py"), None):
        return "prepared"
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if next(path.rglob(f"*{suffix}"), None):
            return kind
    conversations = [file.name for file in sorted(path.iterdir()) if SUFFIXES.get(file.suffix) in ("llava", "mixture")]
    if conversations:
        raise ValueError(f"{path} holds {conversations[:8]}; name the file, not its folder.")
    return "prepared"
