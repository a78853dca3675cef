"""DataConfig -> an endless, resumable iterator of Batch. Order is a pure function of (seed, step, global batch).

    Place per position (order.py)  ->  Slot per row (order.py, grouping.py, packing.py)  ->  [process :: processes]
        ->  read the row's samples (samples.py)  ->  lay them out (row.py)  ->  batch

Process p of P takes the global rows p, p + P, ...: together the processes see the same global batch for every P, also
when P changes at a resume. Only rows that are handed out soon are read: planning reads lengths, no image.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tcjax.batch import Batch
from tcjax.config import DataConfig, Pixels, Source
from tcjax.pipeline import lengths
from tcjax.pipeline.chat import open_chat
from tcjax.pipeline.grouping import Grouped, bucket_lengths
from tcjax.pipeline.order import InOrder, Place, Plan, global_order
from tcjax.pipeline.packing import Packed
from tcjax.pipeline.row import Features, Layout
from tcjax.pipeline.sample import Records
from tcjax.pipeline.samples import KINDS, LABELS, ArrayFeatures, Samples, TooManyCorrupt, TooManyImages
from tcjax.pipeline.source import open_source

__all__ = ["Input", "TooManyCorrupt", "TooManyImages", "make_input"]

BATCHINGS = ("rows", "grouped", "packed")


class Input:
    """The iterator. `get_state()` is a small JSON-able dict; after `set_state` the next batch is the same again.

    plan: global row -> its samples. samples: one per source. layout: how they lie in a row.
    """

    def __init__(self, batches: grain.DatasetIterator, plan: Plan, samples: list[Samples], layout: Layout, batch: int):
        self.plan, self.samples, self.layout = plan, samples, layout
        self._batches, self._batch = batches, batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict:
        """next_index: global batches handed out; and where the plan goes on (`Plan.mark`)."""
        state = self._batches.get_state()
        assert isinstance(state, dict)
        return state | self.plan.mark(state["next_index"] * self._batch)

    def set_state(self, state: dict) -> None:
        mark = {name: value for name, value in state.items() if name != "next_index"}
        self.plan.seek(mark)
        self._batches.set_state({"next_index": state["next_index"]})

    @property
    def skipped(self) -> dict[str, list[str]]:
        """image_ids that were skipped so far, by kind (`samples.KINDS`)."""
        found = sorted(bad for samples in self.samples for bad in samples.skipped.values())
        return {kind: [name for of, name in found if of == kind] for kind in KINDS}

    @property
    def corrupt(self) -> list[str]:
        """image_ids of unreadable images met so far."""
        return self.skipped["corrupt_images"]

    @property
    def dropped_turns(self) -> int:
        """Turns that did not fit into text_length, in the samples read so far; each sample counts once."""
        return sum(sum(samples.dropped_turns.values()) for samples in self.samples)

    @property
    def truncated_answers(self) -> int:
        """Samples read so far of which an answer lost its end to text_length."""
        return sum(len(samples.truncated_answers) for samples in self.samples)

    def counts(self) -> dict[str, int]:
        """What was left out so far, for the log: every kind of skipped sample, and what did not fit into text_length."""
        fitting = {"dropped_turns": self.dropped_turns, "truncated_answers": self.truncated_answers}
        return {kind: len(names) for kind, names in self.skipped.items()} | fitting

    def report(self) -> str:
        """One line about what was left out, "" if nothing was."""
        parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in self.skipped.items() if names]
        if self.dropped_turns:
            parts.append(f"{self.dropped_turns} turns that did not fit")
        if self.truncated_answers:
            parts.append(f"the ends of {self.truncated_answers} answers")
        return "left out: " + ", ".join(parts) if parts else ""


def make_input(
    data: DataConfig,
    pixels: Pixels,
    num_queries: int,
    *,
    root: Path,
    process_index: int = 0,
    process_count: int = 1,
    features: Any = None,
    patch: int | None = None,
    labels: tuple[str, ...] = LABELS,
    instructed: bool = False,
    measuring: Callable[[Source, int, int], None] = lambda source, done, num: None,
    opened: Sequence[Records] = (),
) -> Input:
    """This process's share of every global batch.

    Args:
        root: project root; the paths in `data` are relative to it, and measured lengths are kept below it.
        features: `Features`, or an array [records, N, C] of random access (a memory map); images are then not decoded.
            For a mixture a tuple with one per source.
        patch: patch size of the tower; given, `patch_labels_BNL` is filled from the dataset's `labels`.
        labels: which integer grids become the columns of `patch_labels_BNL`.
        instructed: the compressor is told the question: `instruction_BT` is filled.
        measuring: called with (source, records done, records) while lengths are measured.
        opened: the sources, in their order, if they are open already.

    Returns:
        Input; batches of `data.batch / process_count` rows. `index_B` counts within the image's own source.
    """
    _check(data, process_count, patch)
    per_source = features if isinstance(features, tuple) else (features,)
    if features is not None and len(per_source) != len(data.sources):
        raise ValueError(f"{len(per_source)} feature caches for {len(data.sources)} sources; pass a tuple, one each.")
    chat = open_chat(root / data.tokenizer, data.template)
    samples = []
    for i, source in enumerate(data.sources):
        prepared = opened[i] if opened else open_source(root, source)
        known = None
        if data.batching != "rows":
            known = lengths.measured(
                prepared,
                chat,
                data,
                folder=root / lengths.FOLDER,
                facts=lengths.facts_of(root, source, data, len(prepared)),
                show=partial(measuring, source),
            )
        cached = None if features is None else _readable(per_source[i], prepared)
        samples.append(Samples(prepared, chat, data, pixels, num_queries, cached, patch, labels, known))
    layout = Layout(
        pixels=pixels,
        pad_id=chat.pad_id,
        slots=data.images,
        parts="samples" if data.batching == "packed" else "turns" if data.independent_turns else "",
        instruction_length=data.instruction_length if instructed else 0,
        features=samples[0].features,
    )
    plan = _plan(data, samples, num_queries)
    rows = grain.MapDataset.source(_Rows(plan, samples, layout, skipping=data.batching == "packed"))
    share = rows[process_index::process_count].batch(data.batch // process_count, batch_fn=layout.batch)
    reading = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads)
    return Input(iter(share.to_iter_dataset(reading)), plan, samples, layout, data.batch)


class _Rows:
    """The endless stream of rows as a data source of grain."""

    def __init__(self, plan: Plan, samples: list[Samples], layout: Layout, *, skipping: bool):
        self._plan, self._samples, self._layout, self._skipping = plan, samples, layout, skipping

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> Batch:
        slot = self._plan[index]
        if self._skipping:
            found = [self._samples[place.source].read(place) for place in slot.places]
            return self._layout.row([sample for sample in found if sample is not None], slot.length)
        (place,) = slot.places
        source = self._samples[place.source]
        if not slot.fits:
            return self._layout.row([source.draw(place)], slot.length)
        with_image = source.size(place)[1] > 0

        def fits(other: Place) -> bool:
            size, num = source.size(other)
            return 0 < size <= slot.length and (num > 0) == with_image

        return self._layout.row([source.draw(place, fits)], slot.length)


def _plan(data: DataConfig, samples: list[Samples], num_queries: int) -> Plan:
    stream = global_order([len(source) for source in samples], data.sources, seed=data.seed, turns=data.turns)
    longest = data.images * num_queries + data.text_length
    if data.batching == "rows":
        return InOrder(stream, longest)

    def size(place: Place) -> tuple[int, int]:
        return samples[place.source].size(place)

    if data.batching == "packed":
        return Packed(stream, size, length=longest, slots=data.images, seed=data.seed)
    every = np.concatenate([source.longest() for source in samples])
    return Grouped(
        stream.map(lambda place: samples[place.source].usable(place)),
        size,
        records=len(every),
        batch=data.batch,
        buckets=bucket_lengths(every, data.buckets, longest),
        seed=data.seed,
    )


def _check(data: DataConfig, process_count: int, patch: int | None) -> None:
    if data.batch % process_count:
        raise ValueError(f"data.batch={data.batch} cannot be shared equally by {process_count} processes.")
    if not data.sources:
        raise ValueError("data.sources is empty; name at least one Source(path=..., split=...).")
    if any(source.weight <= 0 for source in data.sources):
        raise ValueError(f"source weights must be positive, got {[source.weight for source in data.sources]}.")
    if data.turns < 0:
        raise ValueError(f"data.turns={data.turns}: takes a whole number from 1 up, or 0 for all turns.")
    if data.batching not in BATCHINGS:
        raise ValueError(f"data.batching={data.batching!r} is not one of {list(BATCHINGS)}.")
    for name in ("images", "buckets"):
        if getattr(data, name) < 1:
            raise ValueError(f"data.{name}={getattr(data, name)}: takes a whole number from 1 up.")
    if data.batching == "packed" and data.independent_turns:
        raise ValueError(
            "data.independent_turns shares one image among the turns of a row, and a packed row shares nothing among its "
            'samples; use batching="rows" or "grouped", or turns=1, which draws one turn of every sample.'
        )
    if patch is not None and data.images > 1:
        raise ValueError(f"dense labels belong to rows of one image, and data.images={data.images}.")


def _readable(features: Any, prepared: Records) -> Features:
    known: Features = features if callable(features) else ArrayFeatures(features, prepared)  # pyright: ignore
    return known


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
