"""web-dataset tars: `{key}.jpg` beside `{key}.txt` or `{key}.json`, by random access.

    0000.jpg 0000.txt 0001.jpg 0001.txt ...   ->   one record per key, image_id = key

Path: one .tar, a folder of them, or "shard-{000..012}.tar". The headers are read once (a tar has no table of contents) and
some 40 bytes per member stay in memory; a member is then one read. For many millions of rows, or for compressed tars,
`tcjax data prepare` writes a form that opens at once.

A text is a caption: one turn with an empty question, as in BLIP's pretraining. JSON may hold `conversations` (LLaVA's), or
a caption; its other keys go to `fields`. Where both lie there, conversations come before the text, and that before the
JSON's caption. Files of one key follow each other, as web-dataset demands.
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcjax.config import Source
from tcjax.pipeline.encoded import SUFFIXES
from tcjax.pipeline.readers.conversation import Row, checked, spoken
from tcjax.pipeline.readers.files import files
from tcjax.pipeline.sample import BrokenShard, Outline, Record, Turn

# The kind of a member is its place here; images come first.
IMAGES = tuple(dict.fromkeys(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))
_KINDS = (*IMAGES, ".txt", ".json")
_TEXT, _JSON = len(IMAGES), len(IMAGES) + 1

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


class _Member(NamedTuple):
    """A file in a tar: whose, of which of `_KINDS`, and where its bytes lie."""

    key: str
    kind: int
    start: int
    size: int


class WebDataset:
    """Random access to the samples of several tars, tar after tar."""

    label_names: tuple[str, ...] = ()

    def __init__(self, tars: list[Path], folder: Path):
        self.folder, self.split, self.tars = folder, "train", tars
        self.name = folder.stem
        keys, key_ends = bytearray(), array("q", [0])
        kinds, starts, sizes, first, owners = array("b"), array("q"), array("q"), array("q", [0]), array("i")
        seen: set[int] = set()  # keys whose run of files has ended in this tar
        for owner, tar in enumerate(tars):
            last = None
            seen.clear()
            for member in _members(tar):
                if member.key != last:
                    if hash(member.key) in seen:
                        raise ValueError(
                            f"{tar}: the files of {member.key!r} do not follow each other, and a web-dataset's must; "
                            f"pack it sorted by name (tar --sort=name)."
                        )
                    last = member.key
                    seen.add(hash(last))
                    keys += member.key.encode(errors="backslashreplace")
                    key_ends.append(len(keys))
                    owners.append(owner)
                    first.append(first[-1])
                kinds.append(member.kind)
                starts.append(member.start)
                sizes.append(member.size)
                first[-1] += 1
        if not owners:
            raise ValueError(f"{tars[0]} holds no {{key}}.jpg, .txt or .json.")
        self._keys, self._key_ends = bytes(keys), np.frombuffer(key_ends, np.int64)
        self._kinds, self._starts = np.frombuffer(kinds, np.int8), np.frombuffer(starts, np.int64)
        self._sizes, self._first = np.frombuffer(sizes, np.int64), np.frombuffer(first, np.int64)
        self._owners = np.frombuffer(owners, np.int32)

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def resident_bytes(self) -> int:
        """What stays in memory."""
        columns = (self._key_ends, self._kinds, self._starts, self._sizes, self._first, self._owners)
        return len(self._keys) + sum(column.nbytes for column in columns)

    def __getitem__(self, index: int) -> Record:
        return self._record(index, with_images=True)

    def outline(self, index: int) -> Outline:
        """The turns and the number of images, without reading them."""
        record = self._record(index, with_images=False)
        return Outline(record.image_id, record.turns, len(record.images))

    def _record(self, index: int, *, with_images: bool) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        key = self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode()
        tar = self.tars[int(self._owners[index])]
        row = Row(f"{tar} row {index}", key)
        pictures, texts, objects = [], [], []
        with open(tar, "rb") as file:
            for at in range(int(self._first[index]), int(self._first[index + 1])):
                kind, size = int(self._kinds[at]), int(self._sizes[at])
                if kind < len(IMAGES) and not size:
                    raise row.bad("empty_images", "its image has 0 bytes")
                if kind < len(IMAGES) and not with_images:
                    size = 0
                file.seek(int(self._starts[at]))
                content = file.read(size)
                if len(content) < size:
                    raise BrokenShard(f"{tar} lost its end since it was opened: {key!r} is cut short.")
                {_TEXT: texts, _JSON: objects}.get(kind, pictures).append(content)
        found = _object(row, objects)
        turns, fields = _turns(row, texts, found)
        if not pictures and "conversations" not in found:
            raise row.bad("missing_images", "a caption without an image")
        return Record(tuple(pictures), key, checked(row, turns, len(pictures)), fields)

    def image_names(self, index: int) -> list[str]:
        """What the images are called in the tar, by key and last suffix."""
        key = self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode()
        kinds = self._kinds[int(self._first[index]) : int(self._first[index + 1])]
        return [key + _KINDS[kind] for kind in kinds if kind < len(IMAGES)]


def open_web_dataset(root: Path, source: Source) -> WebDataset:
    found = [(tar, tar.stat()) for tar in files(root, source.path, ".tar")]
    return _indexed(tuple((tar, about.st_size, about.st_mtime_ns) for tar, about in found), root / source.path)


@lru_cache(maxsize=8)  # a run opens its sources several times, and reading all headers takes a while
def _indexed(tars: tuple[tuple[Path, int, int], ...], folder: Path) -> WebDataset:
    return WebDataset([tar for tar, _, _ in tars], folder)


def _members(tar: Path) -> Iterator[_Member]:
    size = tar.stat().st_size
    with open(tar, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"{tar} is compressed, and random access needs a plain tar; unpack it with gunzip.")
    try:
        with tarfile.open(tar, "r:") as archive:
            while entry := archive.next():
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep every header it read
                found = _NAME.fullmatch(entry.name)
                if not entry.isreg() or not found or found[1].rpartition("/")[2].startswith("__"):
                    continue
                ending = "." + found[2].lower().rpartition(".")[2]
                kind = _KINDS.index(ending) if ending in _KINDS else None
                if entry.offset_data + entry.size > size:
                    raise _cut(tar, f"{entry.name} should end at byte {entry.offset_data + entry.size}")
                if kind is not None:
                    yield _Member(found[1], kind, entry.offset_data, entry.size)
    except tarfile.TarError as error:
        raise _cut(tar, str(error)) from error


def _cut(tar: Path, reason: str) -> BrokenShard:
    return BrokenShard(f"{tar} is cut short or no tar: {reason}, and it has {tar.stat().st_size}; download it again.")


def _object(row: Row, contents: list[bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for content in contents:
        try:
            whole = json.loads(content)
        except ValueError as error:
            raise row.bad("schema", f"its .json is not JSON: {error}") from error
        if not isinstance(whole, dict):
            raise row.bad("schema", f"its .json is a {type(whole).__name__}, not an object")
        found |= whole
    return found


def _turns(row: Row, texts: list[bytes], found: dict[str, Any]) -> tuple[list[Turn], dict[str, Any]]:
    fields = {key: value for key, value in found.items() if key not in ("conversations", "image", "id")}
    if "conversations" in found:
        turns, more = spoken(row, found["conversations"])
        return turns, more | fields
    caption = fields.pop("caption", None)
    if texts:
        try:
            caption = texts[0].decode("utf-8")
        except UnicodeDecodeError as error:
            raise row.bad("schema", f"its .txt is not UTF-8: {error}") from error
    if not isinstance(caption, str):
        raise row.bad("schema", "it has neither a .txt, nor 'caption' or 'conversations' in a .json")
    return [Turn("", caption.strip())], fields
