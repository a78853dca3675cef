"""Reads a whole source once and says what is wrong with it, before a run finds out. It does not stop at the first fault.

Opening already refuses missing and truncated shards; here every record is read, every image decoded as the run would, every
conversation composed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tcjax.config import Pixels
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat
from tcjax.pipeline.encoded import SUFFIXES, probe
from tcjax.pipeline.in_order import in_order
from tcjax.pipeline.sample import BadSample, CorruptImage, Record, Records, image_names


@dataclass(kw_only=True)
class Report:
    """What was read, and what is wrong; empty is good.

    records, images, text_only: read in all. repeated_images: images whose very bytes came before. system_turns:
        conversations that open with one. These, and longest (text positions of the longest conversation, and whose), are
        facts, not problems.
    refused: what is no sample, as {kind of `BadSample`: messages with file, row and id}.
    wrong_extension: files that are another format than their name says; they are read as what they are.
    unsupervised: no answer fits or no word of an answer is known. dropped_turns: {image_id: turns that do not fit}.
    """

    records: int = 0
    images: int = 0
    text_only: int = 0
    repeated_images: int = 0
    system_turns: int = 0
    longest: int = 0
    longest_id: str = ""
    unreadable: list[str] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    corrupt_images: list[str] = field(default_factory=list)
    wrong_extension: list[str] = field(default_factory=list)
    unsupervised: list[str] = field(default_factory=list)
    dropped_turns: dict[str, int] = field(default_factory=dict)
    unknown_words: Counter[str] = field(default_factory=Counter)
    duplicate_ids: list[str] = field(default_factory=list)

    @property
    def findings(self) -> dict[str, list[str]]:
        """What was found, per kind that has anything."""
        kinds = ("unreadable", "corrupt_images", "wrong_extension", "unsupervised", "duplicate_ids")
        found = {kind: getattr(self, kind) for kind in kinds} | self.refused
        found["dropped_turns"] = [f"{name}: {turns}" for name, turns in self.dropped_turns.items()]
        found["unknown_words"] = [f"{word!r}: {times} times" for word, times in self.unknown_words.most_common()]
        return {kind: examples for kind, examples in found.items() if examples}

    @property
    def problems(self) -> dict[str, int]:
        """Number of findings per kind, only kinds that have any."""
        return {kind: len(examples) for kind, examples in self.findings.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        facts = ("records", "images", "text_only", "repeated_images", "system_turns", "longest", "longest_id")
        return {name: getattr(self, name) for name in facts} | {"problems": self.problems, "findings": self.findings}


@dataclass(kw_only=True)
class _Found:
    """Of one record. Kinds of `Report` -> messages."""

    image_id: str = ""
    wrong: list[tuple[str, str]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    refused: bool = False
    num_images: int = 0
    has_system: bool = False
    length: int = 0
    dropped: int = 0
    unknown: Counter[str] = field(default_factory=Counter)


def verify(
    prepared: Records,
    chat: Chat,
    pixels: Pixels,
    *,
    text_length: int,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Every record of a split. progress: called with (records read, records in all) after each."""

    def examine(index: int) -> _Found:
        return _examine(prepared, index, chat, pixels, text_length)

    report, names, seen = Report(), Counter(), set()
    for found in in_order(examine, range(len(prepared)), threads):
        report.records += 1
        _enter(report, found, seen)
        if found.image_id:
            names[found.image_id] += 1
        progress(report.records, len(prepared))
    report.duplicate_ids = [name for name, times in names.items() if times > 1]
    return report


def _enter(report: Report, found: _Found, seen: set[bytes]) -> None:
    for kind, message in found.wrong:
        place = report.refused.setdefault(kind, []) if found.refused else getattr(report, kind)
        place.append(message)
    report.images += found.num_images
    report.text_only += not found.num_images and not found.wrong
    report.system_turns += found.has_system
    report.unknown_words += found.unknown
    for digest in found.digests:
        report.repeated_images += digest in seen
        seen.add(digest)
    if found.dropped:
        report.dropped_turns[found.image_id] = found.dropped
    if found.length > report.longest:
        report.longest, report.longest_id = found.length, found.image_id


def _examine(prepared: Records, index: int, chat: Chat, pixels: Pixels, text_length: int) -> _Found:
    try:
        record = prepared[index]
    except BadSample as error:
        return _Found(image_id=error.image_id, wrong=[(error.kind, str(error))], refused=True)
    except Exception as error:  # whatever the reader meets in a damaged chunk, the rest is still worth reading
        return _Found(wrong=[("unreadable", f"{prepared.split} record {index}: {error}")])
    found = _Found(
        image_id=record.image_id, num_images=len(record.images), has_system=bool(record.fields.get("system"))
    )
    _look(record, image_names(prepared, index), pixels, found)
    _say(record, chat, text_length, found)
    return found


def _look(record: Record, named: list[str], pixels: Pixels, found: _Found) -> None:
    for number, encoded in enumerate(record.images):
        found.digests.append(hashlib.blake2b(encoded, digest_size=12).digest())
        try:
            kind, _ = probe(encoded, record.image_id)
            images.decode(encoded, pixels, record.image_id)
        except CorruptImage:
            found.wrong.append(("corrupt_images", record.image_id))
            continue
        suffix = PurePosixPath(named[number]).suffix.lower() if number < len(named) else ""
        if suffix and suffix not in SUFFIXES[kind]:
            found.wrong.append(("wrong_extension", f"{record.image_id}: {named[number]} is {kind}"))


def _say(record: Record, chat: Chat, text_length: int, found: _Found) -> None:
    found.unknown = Counter(word for turn in record.turns for text in turn for word in _unknown(text, chat))
    try:
        row = chat.compose(
            record.turns,
            num_queries=0,
            text_length=text_length,
            num_images=len(record.images),
            name=record.image_id,
        )
    except ValueError:
        if not found.unknown:
            found.wrong.append(("unsupervised", record.image_id))
        return
    found.dropped, found.length = row.dropped, len(row.ids)
    if not any(row.supervised):
        found.wrong.append(("unsupervised", record.image_id))


def _unknown(text: str, chat: Chat) -> list[str]:
    try:
        chat.encode(text)  # remembered, as the same few questions come again and again
    except ValueError:
        return chat.unknown_words(text)
    return []
