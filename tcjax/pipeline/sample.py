"""What a dataset hands over, whatever its format: records of encoded images and a conversation, by random access."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

MARK = "<image>"


class Turn(NamedTuple):
    """question may hold `<image>` marks as published; without any, the record's images come before the first turn."""

    question: str
    answer: str


class Record(NamedTuple):
    """One sample as it lies on disk. images: encoded bytes, () of a text-only sample. fields: the dataset's others."""

    images: tuple[bytes, ...]
    image_id: str
    turns: list[Turn]
    fields: dict[str, Any]


class BadSample(ValueError):
    """A record that is no sample: its text is no conversation, or its image is not where it should be. image_id names it.

    kind: which rule it breaks, as `tcjax data verify` counts it: "schema", "turns", "empty_answers", "image_marks",
    "missing_images", "empty_images" or "outside_root".
    """

    def __init__(self, image_id: str, reason: str, kind: str = "schema"):
        super().__init__(f"sample {image_id!r} cannot be used ({reason}).")
        self.image_id, self.kind = image_id, kind


class BrokenShard(ValueError):
    """A file is missing, cut short or damaged; the message names it."""


class CorruptImage(ValueError):
    """An image that cannot be read; `image_id` names it."""

    def __init__(self, image_id: str, reason: str):
        super().__init__(f"image {image_id!r} cannot be read ({reason}); replace it and prepare the dataset again.")
        self.image_id = image_id


def some_turns(turns: Sequence[Turn], chosen: Sequence[int]) -> list[Turn]:
    """Some turns of a conversation, asked without the others: marks go, so that all its images come before them."""
    if len(chosen) == len(turns):
        return list(turns)
    return [
        turn._replace(question=turn.question.replace(MARK, "").strip()) if MARK in turn.question else turn
        for turn in (turns[number] for number in chosen)
    ]


class Records(Protocol):
    """Random access to one split of one source; `len()` is the number of records.

    name: of dataset, configuration and version. folder, split: where it lies, for messages.
    label_names: dense labels its records carry (integer grids, by field).
    """

    name: str
    folder: Path
    split: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    @property
    def label_names(self) -> tuple[str, ...]: ...


class Outline(NamedTuple):
    """A record without its images' bytes: all that lengths and order depend on."""

    image_id: str
    turns: list[Turn]
    num_images: int


def outline(records: Records, index: int) -> Outline:
    """The outline of a record; formats that keep images in files of their own do not read them for it.

    Whether those are there and whole, only the record itself says.
    """
    if known := getattr(records, "outline", None):
        return known(index)
    record = records[index]
    return Outline(record.image_id, record.turns, len(record.images))


def image_names(records: Records, index: int) -> list[str]:
    """What the images of a record are called where they were published; [] of formats that do not name them."""
    known = getattr(records, "image_names", None)
    return [] if known is None else known(index)
