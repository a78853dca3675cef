"""Tower tokens on disk: shards of array_record, one entry per record of the dataset, its images' tokens one after another.

    folder/<key>/facts.json                          what the tokens depend on
    folder/<key>/layout.json                         shape, type, records, records per shard
    folder/<key>/00003-of-00021.array_record         records 3 n ... 4 n - 1

An entry is the raw tokens of every image of its record (nothing for text alone), behind them, where images have grids of
their own, two int32 per image. A row of NaN is an image that could not be read. A shard appears under its name when it is
whole, so shards are the units in which a build is shared between processes and resumed after a kill.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled

from tcjax.record import unfinished, write_json

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
STEP = 64  # records per shard are a multiple of the images the tower is given at a time
_LARGEST, _MOST_RECORDS = 2**30, 1024  # 558k images of 1.18 MB are 623 shards; a kill costs seconds to minutes
_OPEN = 256  # shards a process keeps open


@dataclass(frozen=True, kw_only=True)
class Layout:
    """shape: (N, C) of one image. grids: whether two int32 follow for every image. records: of the dataset."""

    shape: tuple[int, ...]
    dtype: str
    grids: bool
    records: int

    @property
    def image_bytes(self) -> int:
        """CLIP-L/336 in bfloat16: 576 * 1024 * 2 = 1_179_648."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize

    @property
    def per_shard(self) -> int:
        """Records of a shard: at most 1 GiB of one image each, and at most 1024."""
        return min(max(_LARGEST // self.image_bytes, STEP), _MOST_RECORDS) // STEP * STEP

    @property
    def num_shards(self) -> int:
        return -(-self.records // self.per_shard)

    def span(self, shard: int) -> range:
        """The records of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.records))

    def path(self, folder: Path, shard: int) -> Path:
        return folder / f"{shard:05}-of-{self.num_shards:05}.array_record"


def write_shard(path: Path, entries: list[list[tuple[np.ndarray, np.ndarray | None]]]) -> None:
    """entries: per record, per image its tokens and, where there are any, its grid.

    Runs of one study that start together write the same shard: the first that is done removes what the others, or one that
    was killed, have begun.
    """
    beside = unfinished(path)
    writer = array_record_module.ArrayRecordWriter(str(beside), "group_size:1,uncompressed")
    for images in entries:
        grids = [grid.astype(np.int32).tobytes() for _, grid in images if grid is not None]
        writer.write(b"".join([tokens.tobytes() for tokens, _ in images] + grids))
    writer.close()
    try:
        beside.replace(path)
    except FileNotFoundError:
        if not path.is_file():
            raise
    for other in path.parent.glob(f"{path.name}.*.writing"):
        other.unlink(missing_ok=True)


class Features:
    """The finished cache, by random access and from several threads: `features(record, number)` is [N, C], read-only."""

    def __init__(self, folder: Path):
        facts = json.loads((folder / "layout.json").read_text())
        self.layout = Layout(**facts | {"shape": tuple(facts["shape"])})
        self.folder, self.shape, self.dtype = folder, self.layout.shape, DTYPES[self.layout.dtype]
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        missing = [shard for shard in range(self.layout.num_shards) if not self.layout.path(folder, shard).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {self.layout.num_shards} shards, {missing[:8]} first; run again to "
                f"compute them. Several hosts share one cache: its folder must lie on a file system that all of them see."
            )

    def __len__(self) -> int:
        return self.layout.records

    def __call__(self, record: int, number: int = 0) -> np.ndarray:
        """[N, C] of image `number` of a record."""
        tokens, _ = self._entry(record)
        if not 0 <= number < len(tokens):
            raise IndexError(
                f"record {record} has {len(tokens)} images in {self.folder}, and number {number} is asked for."
            )
        return tokens[number]

    def grid(self, record: int, number: int = 0) -> np.ndarray | None:
        """int32 rows and columns of an image's own patches; None where every image has the same grid."""
        _, grids = self._entry(record)
        return None if grids is None else grids[number]

    def num_images(self, record: int) -> int:
        """Images of a record."""
        return len(self._entry(record)[0])

    def readable(self, record: int) -> bool:
        """Whether every image of a record could be read."""
        tokens, _ = self._entry(record)
        return bool(np.isfinite(tokens[:, 0, 0].astype(np.float32)).all())

    def _entry(self, record: int) -> tuple[np.ndarray, np.ndarray | None]:
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)} in {self.folder}.")
        shard, place = divmod(int(record), self.layout.per_shard)
        (entry,) = self._reader(shard).read([place])
        num = len(entry) // (self.layout.image_bytes + 8 * self.layout.grids)
        tokens = np.frombuffer(entry, self.dtype, num * int(np.prod(self.shape))).reshape(num, *self.shape)
        if not self.layout.grids:
            return tokens, None
        return tokens, np.frombuffer(entry, np.int32, offset=num * self.layout.image_bytes).reshape(num, 2)

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                path = str(self.layout.path(self.folder, shard))
                self._readers[shard] = array_record_module.ArrayRecordReader(path, options="readahead_buffer_size:0")
                if len(self._readers) > _OPEN:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return self._readers[shard]


def save_layout(folder: Path, layout: Layout, facts: dict[str, Any]) -> None:
    write_json(folder / "facts.json", facts)
    write_json(folder / "layout.json", asdict(layout))
