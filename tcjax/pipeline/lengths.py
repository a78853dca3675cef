"""How long every sample of a source is, measured once: what grouping and packing plan by.

    folder/<key>.npz     first_R, text_E, images_R; known: records that are never a sample, and why

The key is a hash of everything a length depends on: the source's content, the tokenizer file, the template, text_length,
turns and this package's version. Q is not among them: lengths count text positions, and images apart. Only text is
read and tokenized: image files are not opened, so one that is missing shows when its sample is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tcjax
from tcjax.config import DataConfig, Source
from tcjax.identity import content
from tcjax.pipeline.chat import Chat, Unsupervised
from tcjax.pipeline.order import Place
from tcjax.pipeline.sample import BadSample, Records, outline, some_turns
from tcjax.record import fingerprint, to_dict

FOLDER = "runs/lengths"
_CHUNK = 1024  # records handed to the threads between two reports of progress


class Lengths(NamedTuple):
    """first_R: int64 [records + 1], where a record's entries of text_E begin and the next one's do.

    text_E: int32, positions beside those of images: one entry of the whole conversation, or, where turns are drawn, one
        of every turn alone. 0: no answer fits.
    images_R: int32, images that the record's sample shows. known: {record: (kind, image_id)} that can never be samples.
    """

    first_R: np.ndarray
    text_E: np.ndarray
    images_R: np.ndarray
    known: dict[int, tuple[str, str]]

    def text(self, place: Place, data: DataConfig) -> int:
        """Text positions of the sample at `place`, 0 if it is none.

        Several drawn turns are counted with a begin mark each: never too few, and at most text_length.
        """
        entries_E = self.text_E[self.first_R[place.index] : self.first_R[place.index + 1]]
        if data.turns:
            entries_E = entries_E[place.chosen(len(entries_E), data.turns)]
        return min(int(entries_E.sum()), data.text_length)

    def longest(self, data: DataConfig) -> np.ndarray:
        """int [records]: text positions of every record, of its longest turns where turns are drawn."""
        if not data.turns:
            return self.text_E
        each = np.split(self.text_E, self.first_R[1:-1])
        return np.array([min(int(np.sort(text)[-data.turns :].sum()), data.text_length) for text in each])


def measured(
    records: Records,
    chat: Chat,
    data: DataConfig,
    *,
    folder: Path | None = None,
    facts: dict[str, Any] | None = None,
    show: Callable[[int, int], None] = lambda done, num: None,
) -> Lengths:
    """The lengths of every record, from `folder` if they lie there.

    Args:
        folder: where measured lengths are kept; None keeps nothing.
        facts: what they depend on (`facts_of`).
        show: called with (records done, records).

    Raises:
        ValueError: a word is unknown to the tokenizer.
    """
    path = None if folder is None else folder / f"{_key(facts or {})}.npz"
    if path is not None and path.exists():
        return _read(path)
    threads, num, rows = max(data.threads, 1), len(records), []
    with ThreadPoolExecutor(threads) as pool:
        upcoming = iter(range(num))
        while chunk := list(islice(upcoming, _CHUNK)):
            rows += pool.map(lambda index: _measure(records, index, chat, data), chunk)
            show(len(rows), num)
    found = Lengths(
        np.cumsum([0, *(len(text) for text, _, _ in rows)], dtype=np.int64),
        np.array([length for text, _, _ in rows for length in text], np.int32),
        np.array([images for _, images, _ in rows], np.int32),
        {index: bad for index, (_, _, bad) in enumerate(rows) if bad is not None},
    )
    if path is not None:
        _write(path, found, facts or {})
    return found


def facts_of(root: Path, source: Source, data: DataConfig, num: int) -> dict[str, Any]:
    """Everything the lengths of a source depend on, JSON types. The source's weight is not of it."""
    return {
        "source": fingerprint(replace(source, weight=1.0), root),
        "records": num,
        "tokenizer": content(root, data.tokenizer),
        "template": to_dict(data.template),
        "text_length": data.text_length,
        "turns": data.turns,
        "version": tcjax.__version__,
    }


def _measure(
    records: Records, index: int, chat: Chat, data: DataConfig
) -> tuple[list[int], int, tuple[str, str] | None]:
    """Entries of text_E, images, and why it is no sample."""
    try:
        record = outline(records, index)
    except BadSample as error:
        return [0], 0, ("bad_samples", error.image_id)
    num = len(record.turns)
    entries, images = [], 0
    for chosen in [[turn] for turn in range(num)] if data.turns else [range(num)]:
        try:
            composed = chat.compose(
                some_turns(record.turns, chosen),
                num_queries=0,
                text_length=data.text_length,
                num_images=record.num_images,
                name=record.image_id,
            )
        except Unsupervised:
            entries.append(0)
        except BadSample:
            return [0], 0, ("bad_samples", record.image_id)
        else:
            entries.append(len(composed.ids))
            images = composed.num_images
    bad = None if any(entries) else ("unsupervised", record.image_id)
    return entries or [0], images, bad


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, found: Lengths, facts: dict[str, Any]) -> None:
    """Atomically, also where several processes measure the same source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.stem}.{os.getpid()}.writing.npz")
    known = [[index, *why] for index, why in found.known.items()]
    np.savez(
        beside,
        first_R=found.first_R,
        text_E=found.text_E,
        images_R=found.images_R,
        known=json.dumps(known),
        facts=json.dumps(facts),
    )
    beside.replace(path)


def _read(path: Path) -> Lengths:
    with np.load(path, allow_pickle=False) as file:
        known: Iterable[list[Any]] = json.loads(str(file["known"]))
        return Lengths(
            file["first_R"], file["text_E"], file["images_R"], {index: (kind, name) for index, kind, name in known}
        )
