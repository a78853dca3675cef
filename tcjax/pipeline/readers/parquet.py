"""Parquet as the Hugging Face Hub serves it: FineVision's and the Cauldron's rows, and LLaVA-OneVision's.

    {images: [{bytes, path}], texts: [{user, assistant}], source, relevance_ratings: [int per text], ...}
    {id, image: {bytes, path}, conversations: [{from, value}], ...}

Path: one .parquet, a folder of them (of whose names "train-00000-of-00010.parquet" gives the split), or one counted in
braces. Images stand before the first turn unless marks place them. An image without bytes is read by its path below
`Source.images`.

`Source.min_rating` keeps a text only if each of its ratings is there and high enough, or missing, as nanoVLM does; a row
that keeps none is no row. Every other column goes to `Record.fields`, ratings and the like cut to the kept texts.

Parquet gives whole row groups: two stay in memory, and reading in order is fast. A shuffled training over large files
should read what `tcjax data prepare` makes of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tcjax.config import Source
from tcjax.pipeline.readers.conversation import Row, checked
from tcjax.pipeline.readers.files import files
from tcjax.pipeline.readers.image_folder import ImageFolder
from tcjax.pipeline.readers.llava import conversation_record
from tcjax.pipeline.sample import BrokenShard, Record, Turn

KEPT_GROUPS = 2

RATINGS = ("relevance_ratings", "image_correspondence_ratings", "visual_dependency_ratings", "formatting_ratings")

_SPLITS = ("train", "validation", "val", "test", "dev")


class Parquet:
    """Random access to the rows of several files, file after file; safe from several threads."""

    label_names: tuple[str, ...] = ()

    def __init__(self, paths: list[Path], folder: Path, *, split: str, images: Path, min_rating: int = 0):
        self.folder, self.split, self.name, self._min = folder, split, folder.stem, min_rating
        self._images, self._lock = ImageFolder(images), threading.Lock()
        self._files, self._groups = [], []  # one (file, group) per row group
        counts = []
        for path in paths:
            file = _open(path)
            _check_columns(path, file.schema_arrow)
            for group in range(file.num_row_groups):
                self._groups.append((len(self._files), group))
                counts.append(file.metadata.row_group(group).num_rows)
            self._files.append((path, file))
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._rows = self._well_rated() if min_rating else None
        if not len(self):
            raise ValueError(f"{folder} ({split}) holds no row{f' rated {min_rating} or more' if min_rating else ''}.")

    def __len__(self) -> int:
        if self._rows is not None:
            return len(self._rows)
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        return self._record(*self._found(index))

    def image_names(self, index: int) -> list[str]:
        """The paths that stand beside the images' bytes, "" where none does."""
        found, _, _ = self._found(index)
        images = found.get("images") or [found.get("image")]
        return [image.get("path") or "" if isinstance(image, dict) else "" for image in images]

    def _found(self, index: int) -> tuple[dict[str, Any], Path, int]:
        """A row as it lies there, its file, and its number among all rows."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        whole = index if self._rows is None else int(self._rows[index])
        group = int(np.searchsorted(self._ends, whole, side="right"))
        table = self._table(group)
        at = whole - int(self._ends[group]) + table.num_rows
        path, _ = self._files[self._groups[group][0]]
        return table.slice(at, 1).to_pylist()[0], path, whole

    def _record(self, found: dict[str, Any], path: Path, index: int) -> Record:
        name = found.get("id")
        row = Row(f"{path} row {index} of {self.folder.name}", f"{path.stem}:{index}" if name is None else str(name))
        if "texts" not in found:
            paths = found.pop("image", None) or found.pop("images", None)
            return conversation_record(row, found, paths, lambda image: self._bytes(image, row))
        texts = found.pop("texts") or []
        kept = [i for i in range(len(texts)) if _rated(found, i, self._min)]
        turns = [_turn(row, texts[i]) for i in kept]
        images = tuple(self._bytes(image, row) for image in found.pop("images", None) or [])
        fields = {key: value for key, value in found.items() if key != "id"}
        for key in RATINGS:
            if isinstance(fields.get(key), list) and len(fields[key]) == len(texts):
                fields[key] = [fields[key][i] for i in kept]
        return Record(images, row.image_id, checked(row, turns, len(images)), fields)

    def _bytes(self, image: Any, row: Row) -> bytes:
        if isinstance(image, bytes):
            return image
        if not isinstance(image, dict) or not {"bytes", "path"} & set(image):
            raise row.bad("schema", f"an image must be {{bytes, path}}, not {type(image).__name__}")
        encoded = image.get("bytes")
        if encoded is None:
            return self._images.read(image.get("path") or "", row)
        if not encoded:
            raise row.bad("empty_images", "an image has 0 bytes")
        return encoded

    def _table(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._held:
                self._held[group] = self._read(group)
                if len(self._held) > KEPT_GROUPS:
                    self._held.popitem(last=False)
            self._held.move_to_end(group)
            return self._held[group]

    def _read(self, group: int, columns: list[str] | None = None) -> pa.Table:
        path, file = self._files[self._groups[group][0]]
        try:
            return file.read_row_group(self._groups[group][1], columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise BrokenShard(f"{path}, row group {self._groups[group][1]}, is damaged: {error}") from error

    def _well_rated(self) -> np.ndarray:
        """int64 rows with at least one text rated well enough; reads the columns of ratings only."""
        rows = []
        for group, end in enumerate(self._ends):
            names = self._files[self._groups[group][0]][1].schema_arrow.names
            wanted = [name for name in RATINGS if name in names]
            if not wanted:
                raise ValueError(f"Source.min_rating={self._min}, and {self.folder} has none of {list(RATINGS)}.")
            table = self._read(group, [*wanted, "texts"])
            lengths = [len(texts) if texts.is_valid else 0 for texts in table["texts"]]
            start = int(end) - table.num_rows
            for at, found in enumerate(table.select(wanted).to_pylist()):
                if any(_rated(found, i, self._min) for i in range(lengths[at])):
                    rows.append(start + at)
        return np.array(rows, np.int64)


def _rated(found: dict[str, Any], text: int, least: int) -> bool:
    """Whether each rating of a text is missing or at least `least`."""
    columns = (found.get(name) for name in RATINGS)
    given = (ratings[text] for ratings in columns if ratings is not None and text < len(ratings))
    return least <= 0 or all(rating is None or rating >= least for rating in given)


def _turn(row: Row, text: Any) -> Turn:
    if not isinstance(text, dict) or not all(isinstance(text.get(name), str) for name in ("user", "assistant")):
        raise row.bad("schema", f"a text must be {{user, assistant}}, two strings, not {text!r:.60}")
    return Turn(text["user"], text["assistant"])


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise BrokenShard(f"{path} is cut short or no parquet file: {error}") from error


def _check_columns(path: Path, schema: pa.Schema) -> None:
    if "texts" in schema.names or "conversations" in schema.names:
        return
    raise ValueError(
        f"{path} has the columns {schema.names}; it needs images and texts (FineVision, the Cauldron), "
        f"or image and conversations (LLaVA)."
    )


def open_parquet(root: Path, source: Source) -> Parquet:
    found = files(root, source.path, ".parquet")
    if (root / source.path).is_dir():
        named = {file: file.stem.partition("-")[0] for file in found}
        splits = {name for name in named.values() if name in _SPLITS}
        found = [file for file in found if (named[file] if splits else "train") == source.split]
        if not found:
            raise ValueError(f"{source.split!r} is not a split of {root / source.path}; it has {sorted(splits)}.")
    images = root / (source.images or source.path)
    if not source.images and not images.is_dir():
        images = images.parent
    return Parquet(found, root / source.path, split=source.split, images=images, min_rating=source.min_rating)
