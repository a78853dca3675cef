"""The rows of one big JSON list or JSONL file by random access: the file stays on disk, 8 bytes per row stay in memory.

    JsonRows(path)[i] -> dict

A list is scanned once in pieces of a few MiB, parsing row after row only to find where each ends: decoded as Latin-1 every
byte is one character, so positions in the text are positions in the file, and JSON's structure is ASCII in any case. What
cannot be parsed is named with row and byte. JSON lines are only cut at newlines; a damaged one shows when it is read.
"""

from __future__ import annotations

import json
import os
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tcjax.pipeline.sample import BadSample, BrokenShard

_PIECE = 4 << 20
_LONGEST = 64 << 20  # a row beyond this is no row, but a quote that never closes
_SPACE = " \t\r\n"


class JsonRows:
    """Random access to the objects of a .json list or a .jsonl file; safe from several threads."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"no file {path}.")
        self.path = path
        about = path.stat()
        self._starts = _starts(path.resolve(), about.st_size, about.st_mtime_ns)
        if not len(self):
            raise BrokenShard(f"{path} holds no row.")
        self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115  # as long as the rows live

    def __del__(self):
        if file := getattr(self, "_file", None):
            file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def resident_bytes(self) -> int:
        """What stays in memory, beside the open file."""
        return self._starts.nbytes

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = (int(at) for at in self._starts[index : index + 2])
        where, name = f"{self.path} row {index}", f"{self.path.name}:{index}"
        try:
            text = os.pread(self._file.fileno(), end - start, start).decode("utf-8")
            row, _ = json.JSONDecoder().raw_decode(text)
        except ValueError as error:  # both of Unicode and of JSON
            raise BadSample(name, f"{where}: it is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadSample(name, f"{where}: it is a {type(row).__name__}, not an object")
        return row


@lru_cache(maxsize=32)  # a run opens its sources several times: for features, lengths, batches and scores
def _starts(path: Path, size: int, modified: int) -> np.ndarray:
    """int64 starts of the rows, and the end of the last; size and modified are there for the cache alone."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head:
            raise BrokenShard(f"{path} is empty: {size} bytes, no row.")
        if head[:1] not in (b"[", b"{"):
            raise ValueError(
                f"{path} is neither a JSON list of objects nor one object per line: it starts {head[:20]!r}."
            )
        return np.frombuffer(_scan_list(path, file) if head[:1] == b"[" else _scan_lines(path), np.int64)


def _scan_list(path: Path, file: BinaryIO) -> array:
    """int64 starts of the rows, and where the last one's neighbour would start."""
    starts, pieces = array("q"), _Window(file)
    decoder = json.JSONDecoder()
    pieces.skip("\ufeff\xef\xbb\xbf" + _SPACE)
    pieces.take("[")
    pieces.skip(_SPACE)
    while not pieces.take("]"):
        if starts and not pieces.take(","):
            raise _damaged(path, len(starts), pieces.position, "a comma or the end of the list is missing")
        pieces.skip(_SPACE)
        start = pieces.position
        while True:
            try:
                if pieces.peek() != "{":
                    raise json.JSONDecodeError("a row is not an object", pieces.text, pieces.at)
                _, pieces.at = decoder.raw_decode(pieces.text, pieces.at)
                break
            except json.JSONDecodeError as error:
                if len(pieces.text) - pieces.at > _LONGEST or not pieces.more():
                    raise _damaged(path, len(starts), start, error.msg) from error
        starts.append(start)
        pieces.skip(_SPACE)
    starts.append(pieces.position)
    pieces.skip(_SPACE)
    if pieces.peek():
        raise _damaged(path, len(starts) - 1, pieces.position, "something follows the list")
    return starts


class _Window:
    """A piece of the file as Latin-1 text, and a place in it."""

    def __init__(self, file: BinaryIO):
        file.seek(0)
        self._file, self.text, self.at, self._before = file, "", 0, 0

    @property
    def position(self) -> int:
        return self._before + self.at

    def more(self) -> bool:
        """Forgets what lies behind, reads as much again as is still open; False at the end of the file."""
        piece = self._file.read(max(_PIECE, len(self.text) - self.at)).decode("latin-1")
        self._before, self.text, self.at = self.position, self.text[self.at :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        while self.at >= len(self.text):
            if not self.more():
                return ""
        return self.text[self.at]

    def skip(self, characters: str) -> None:
        while (here := self.peek()) and here in characters:
            self.at += 1

    def take(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self.at += 1
        return True


def _damaged(path: Path, row: int, byte: int, reason: str) -> BrokenShard:
    return BrokenShard(
        f"{path} is cut short or damaged: row {row} at byte {byte} of {path.stat().st_size} cannot be read ({reason}); "
        f"download it again."
    )


def _scan_lines(path: Path) -> array:
    starts, at = array("q"), 0
    with open(path, "rb") as lines:
        for line in lines:
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                starts.append(at + (3 if at == 0 and line.startswith(b"\xef\xbb\xbf") else 0))
            at += len(line)
    starts.append(at)
    return starts
