"""Reads a whole dataset once and says what is wrong with it, before a run finds out.

Opening already refuses missing and truncated shards; here every record is read, every image decoded, every turn
rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tcjax.config import Pixels
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat
from tcjax.pipeline.sample import Record, Records


@dataclass(kw_only=True)
class Report:
    """records: read in all. Every other field names samples (image_id) or, for words, counts them; empty is good.

    unsupervised: no answer fits or no word of an answer is known. longest: text positions of the longest conversation.
    """

    records: int = 0
    longest: int = 0
    unreadable: list[str] = field(default_factory=list)
    corrupt_images: list[str] = field(default_factory=list)
    unsupervised: list[str] = field(default_factory=list)
    dropped_turns: dict[str, int] = field(default_factory=dict)
    unknown_words: Counter[str] = field(default_factory=Counter)
    duplicate_ids: list[str] = field(default_factory=list)

    @property
    def problems(self) -> dict[str, int]:
        """Number of findings per kind, only kinds that have any."""
        kinds = ("unreadable", "corrupt_images", "unsupervised", "dropped_turns", "unknown_words", "duplicate_ids")
        return {kind: len(getattr(self, kind)) for kind in kinds if getattr(self, kind)}


def verify(
    prepared: Records,
    chat: Chat,
    pixels: Pixels,
    *,
    text_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Every record of a split. progress: called with (records read, records in all) after each."""
    report, names = Report(), Counter()
    for index in range(len(prepared)):
        try:
            record = prepared[index]
        except Exception as error:  # whatever the reader meets in a damaged chunk, the rest is still worth reading
            report.unreadable.append(f"{prepared.split} record {index}: {error}")
        else:
            names[record.image_id] += 1
            _examine(record, report, chat, pixels, text_length)
        report.records += 1
        progress(report.records, len(prepared))
    report.duplicate_ids = [name for name, times in names.items() if times > 1]
    return report


def _examine(record: Record, report: Report, chat: Chat, pixels: Pixels, text_length: int) -> None:
    try:
        for encoded in record.images:
            images.decode(encoded, pixels, record.image_id)
    except images.CorruptImage:
        report.corrupt_images.append(record.image_id)
    unknown = Counter(word for turn in record.turns for text in turn for word in _unknown(text, chat))
    report.unknown_words += unknown
    try:
        row = chat.render(record.turns, num_queries=0, text_length=text_length, name=record.image_id)
    except ValueError:
        if not unknown:
            report.unsupervised.append(record.image_id)
        return
    if row.dropped:
        report.dropped_turns[record.image_id] = row.dropped
    report.longest = max(report.longest, int(row.valid_S.sum()))


def _unknown(text: str, chat: Chat) -> list[str]:
    try:
        chat.encode(text)  # remembered, as the same few questions come again and again
    except ValueError:
        return chat.unknown_words(text)
    return []
