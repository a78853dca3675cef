"""DataConfig -> an endless, resumable iterator of Batch. Order is a pure function of (seed, step, global batch).

    every source: shuffle, reshuffle per epoch  ->  mix by weight  ->  [process :: processes]  ->  render  ->  batch

Process p of P takes the global positions p, p + P, ...: together the processes see the same global batch for every P.
An unreadable image is replaced by the next readable one of its source, which keeps that order and exact resumption;
each is counted and named, and a share above `DataConfig.max_corrupt` stops the run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from tcjax.batch import Batch
from tcjax.config import DataConfig, Pixels
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat, fitted, open_chat
from tcjax.pipeline.sample import Record, Records
from tcjax.pipeline.source import open_source

LABELS = ("digit_cells", "colour_cells")

# Images read before the share so far is judged; before that only an excess over the whole split stops the run.
_ENOUGH = 100


class TooManyCorrupt(ValueError):
    """More unreadable images than `DataConfig.max_corrupt` allows."""


class Samples:
    """One source as random access to rows of a Batch (no batch axis yet); safe to read from several threads.

    features: index in the split -> float32 [N, C] of the cached tower; a row of NaN stands for an unreadable image.
    instructed: fill `instruction_BT`.
    """

    def __init__(
        self,
        prepared: Records,
        chat: Chat,
        data: DataConfig,
        pixels: Pixels,
        num_queries: int,
        features: Sequence[np.ndarray] | np.ndarray | None = None,
        patch: int | None = None,
        labels: tuple[str, ...] = LABELS,
        instructed: bool = False,
    ):
        if data.turns < 0:
            raise ValueError(f"data.turns={data.turns}: takes a whole number from 1 up, or 0 for all turns.")
        if patch is not None and not set(labels) <= set(prepared.label_names):
            raise ValueError(f"{prepared.folder} has no dense labels {labels}; it has {prepared.label_names}.")
        if features is not None and len(features) != len(prepared):
            raise ValueError(f"{len(features)} cached features for the {len(prepared)} records of {prepared.split}.")
        self.prepared, self.chat, self.data, self.pixels = prepared, chat, data, pixels
        self.num_queries, self.features, self.patch, self.labels = num_queries, features, patch, labels
        self.instructed = instructed
        self.corrupt: dict[int, str] = {}
        self.dropped_turns: dict[int, int] = {}
        self._seen = np.zeros(len(prepared), bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> Batch:
        return self.draw(index, None)

    def draw(self, index: int, random: np.random.Generator | None) -> Batch:
        """The row of a record, or of the next readable one; `random` chooses its turns where `data.turns` wants some."""
        for step in range(len(self)):
            at = (index + step) % len(self)
            if at in self.corrupt:
                continue
            try:
                row = self._read(at, random)
            except images.CorruptImage as error:
                self._count(at, error)
            else:
                self._seen[at] = True
                return row
        raise TooManyCorrupt(f"no image of {self.prepared.folder} can be read.")

    def _read(self, index: int, random: np.random.Generator | None) -> Batch:
        record = self.prepared[index]
        turns = record.turns
        if random is not None and len(turns) > self.data.turns:
            chosen = np.sort(random.permutation(len(turns))[: self.data.turns])
            turns = [turns[i] for i in chosen]
        image_YX3 = features_NC = labels_NL = None
        if self.features is None:
            image_YX3 = images.decode(record.images[0], self.pixels, record.image_id)
        else:
            features_NC = np.asarray(self.features[index])
            if np.isnan(features_NC[0, 0]):
                raise images.CorruptImage(record.image_id, "it had no readable pixels when its features were cached")
        if self.patch is not None:
            labels_NL = patch_labels(record, self.labels, self.pixels.size_YX, self.patch)
        row = self.chat.render(
            turns, num_queries=self.num_queries, text_length=self.data.text_length, name=record.image_id
        )
        if row.dropped:
            self.dropped_turns[index] = row.dropped
        return Batch(
            row.tokens_S,
            row.is_image_S,
            row.supervised_S,
            row.valid_S,
            row.segment_S if self.data.independent_turns else None,
            fitted(row.instruction, self.data.instruction_length) if self.instructed else None,
            np.int32(index),
            image_YX3,
            features_NC,
            labels_NL,
        )

    def _count(self, index: int, error: images.CorruptImage) -> None:
        with self._lock:
            self._seen[index] = True
            self.corrupt[index] = error.image_id
            bad, seen, allowed = len(self.corrupt), int(self._seen.sum()), self.data.max_corrupt
        # Three standard deviations: a healthy dataset must not stop over one unlucky batch.
        unlikely = seen >= _ENOUGH and bad > allowed * seen + 3 * (allowed * seen) ** 0.5
        if unlikely or bad > allowed * len(self):
            raise TooManyCorrupt(
                f"{bad} of {seen} images read from {self.prepared.folder} ({self.prepared.split}, {len(self)} records) "
                f"are unreadable, more than max_corrupt={allowed} allows: {sorted(self.corrupt.values())[:8]}. "
                f"Run `tcjax data verify`, repair the images, or raise max_corrupt."
            ) from error


class Input:
    """The iterator. `get_state()` is a small JSON-able dict; after `set_state` the next batch is the same again."""

    def __init__(self, batches: grain.DatasetIterator, samples: list[Samples]):
        self._batches, self._samples = batches, samples

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict:
        state = self._batches.get_state()
        assert isinstance(state, dict)
        return state

    def set_state(self, state: dict) -> None:
        self._batches.set_state(state)

    @property
    def corrupt(self) -> list[str]:
        """image_ids that were skipped so far."""
        return sorted(name for samples in self._samples for name in samples.corrupt.values())

    @property
    def dropped_turns(self) -> int:
        """Turns that did not fit into text_length, in the samples read so far; each sample counts once."""
        return sum(sum(samples.dropped_turns.values()) for samples in self._samples)


def make_input(
    data: DataConfig,
    pixels: Pixels,
    num_queries: int,
    *,
    root: Path,
    process_index: int = 0,
    process_count: int = 1,
    features: Sequence[np.ndarray] | np.ndarray | tuple | None = None,
    patch: int | None = None,
    labels: tuple[str, ...] = LABELS,
    instructed: bool = False,
) -> Input:
    """This process's share of every global batch.

    Args:
        root: project root; the paths in `data` are relative to it.
        features: index in the split -> float32 [N, C], random access (an array, a memory map); images are then not
            decoded. For a mixture a tuple with one per source.
        patch: patch size of the tower; given, `patch_labels_BNL` is filled from the dataset's `labels`.
        labels: which integer grids become the columns of `patch_labels_BNL`.
        instructed: the compressor is told the question: `instruction_BT` is filled.

    Returns:
        Input; batches of `data.batch / process_count` rows. `index_B` counts within the row's own source.
    """
    if data.batch % process_count:
        raise ValueError(f"data.batch={data.batch} cannot be shared equally by {process_count} processes.")
    if not data.sources:
        raise ValueError("data.sources is empty; name at least one Source(path=..., split=...).")
    if any(source.weight <= 0 for source in data.sources):
        raise ValueError(f"source weights must be positive, got {[source.weight for source in data.sources]}.")
    per_source = features if isinstance(features, tuple) else (features,)
    if features is not None and len(per_source) != len(data.sources):
        raise ValueError(f"{len(per_source)} feature caches for {len(data.sources)} sources; pass a tuple, one each.")
    chat = open_chat(root / data.tokenizer, data.template)
    samples, streams = [], []
    for i, source in enumerate(data.sources):
        cached = None if features is None else per_source[i]
        prepared = open_source(root, source)
        samples.append(Samples(prepared, chat, data, pixels, num_queries, cached, patch, labels, instructed))
        seed = int(np.random.SeedSequence([data.seed, i]).generate_state(1)[0])
        stream = grain.MapDataset.source(range(len(samples[-1]))).shuffle(seed=seed).repeat()
        read = samples[-1]
        streams.append(stream.random_map(read.draw, seed=seed) if data.turns else stream.map(read.__getitem__))
    mixed = streams[0]
    if len(streams) > 1:
        mixed = grain.MapDataset.mix(streams, weights=[source.weight for source in data.sources])
    share = mixed[process_index::process_count].batch(
        data.batch // process_count, batch_fn=lambda rows: stack(rows, pixels)
    )
    reading = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads)
    return Input(iter(share.to_iter_dataset(reading)), samples)


def stack(rows: Sequence[Batch], pixels: Pixels) -> Batch:
    """Rows -> Batch; pixels are normalised here, once per batch."""
    columns = {}
    for name in Batch._fields:
        values = [getattr(row, name) for row in rows]
        columns[name] = None if values[0] is None else np.stack(values)
    if columns["images_BYX3"] is not None:
        columns["images_BYX3"] = images.normalise(columns["images_BYX3"], pixels)
    return Batch(**columns)


def patch_labels(record: Record, labels: tuple[str, ...], size_YX: tuple[int, int], patch: int) -> np.ndarray:
    """int32 labels_NL: for each patch, row-major, 1 + the label of the cell its centre lies in, 0 where empty."""
    grids = [np.asarray(record.fields[name]) for name in labels]
    rows, columns = grids[0].shape
    Y, X = size_YX
    H, W = Y // patch, X // patch
    row_N = ((np.arange(H) + 0.5) * patch * rows / Y).astype(int).repeat(W)
    column_N = np.tile(((np.arange(W) + 0.5) * patch * columns / X).astype(int), H)
    return np.stack([grid[row_N, column_N] + 1 for grid in grids], axis=-1).astype(np.int32)
