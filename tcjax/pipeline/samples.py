"""One source as random access to samples; what cannot be used is skipped, counted by kind and named.

    corrupt_images   an image that cannot be decoded
    bad_samples      a record that is no conversation, or whose image is not where it should be
    unsupervised     no answer fits into text_length: nothing to learn

In a row of its own such a sample is replaced by the next usable one of its source, which keeps the order and exact
resumption; in a packed row its part stays empty and nothing else moves. A share above `DataConfig.max_corrupt` stops the
run. Two images where one is allowed is no accident of one sample but a wrong setting: it stops the run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tcjax.config import DataConfig, Pixels
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat, Unsupervised
from tcjax.pipeline.lengths import Lengths
from tcjax.pipeline.order import Place
from tcjax.pipeline.row import Features, Sample
from tcjax.pipeline.sample import BadSample, Record, Records, outline, some_turns

KINDS = ("corrupt_images", "bad_samples", "unsupervised")
LABELS = ("digit_cells", "colour_cells")

# Samples read before the share so far is judged; before that only an excess over the whole split stops the run.
_ENOUGH = 100


class TooManyCorrupt(ValueError):
    """More samples that cannot be used than `DataConfig.max_corrupt` allows."""


class TooManyImages(ValueError):
    """A sample has more images than a row has slots for."""


class Samples:
    """Safe to read from several threads.

    features: the tower's tokens of every image; images are then not decoded.
    lengths: of every record, where rows are planned by them.
    skipped: {record: (kind, image_id)} of what could not be used so far, including what measuring the lengths found.
    dropped_turns: {record: turns that did not fit into text_length}, of samples read so far.
    truncated_answers: records of which an answer lost its end.
    """

    def __init__(
        self,
        prepared: Records,
        chat: Chat,
        data: DataConfig,
        pixels: Pixels,
        num_queries: int,
        features: Features | None = None,
        patch: int | None = None,
        labels: tuple[str, ...] = LABELS,
        lengths: Lengths | None = None,
    ):
        if patch is not None and not set(labels) <= set(prepared.label_names):
            raise ValueError(f"{prepared.folder} has no dense labels {labels}; it has {prepared.label_names}.")
        self.prepared, self.chat, self.data, self.pixels = prepared, chat, data, pixels
        self.num_queries, self.features, self.patch, self.labels = num_queries, features, patch, labels
        self.lengths = lengths
        self.skipped: dict[int, tuple[str, str]] = {} if lengths is None else dict(lengths.known)
        self.dropped_turns: dict[int, int] = {}
        self.truncated_answers: set[int] = set()
        self._known = len(self.skipped)
        self._seen = np.zeros(len(prepared), bool)
        self._lock = threading.Lock()
        if lengths is not None:
            self._check(lengths)

    def __len__(self) -> int:
        return len(self.prepared)

    def read(self, place: Place) -> Sample | None:
        """The sample of a record; None if it cannot be used."""
        kind, _ = self.skipped.get(place.index, ("", ""))
        if kind and not (kind == "unsupervised" and place.draw):  # another turn of it may fit
            return None
        try:
            sample = self._read(place)
        except (images.CorruptImage, BadSample) as error:
            self._count(place.index, error)
            return None
        self._seen[place.index] = True
        return sample

    def draw(self, place: Place, fits: Callable[[Place], bool] = lambda place: True) -> Sample:
        """The sample of a record, or of the next one of this source that can be used and `fits`."""
        for step in range(len(self)):
            other = place._replace(index=(place.index + step) % len(self))
            if (step == 0 or fits(other)) and (sample := self.read(other)) is not None:
                return sample
        raise TooManyCorrupt(f"no sample of {self.prepared.folder} can be used: {self._named()}.")

    def size(self, place: Place) -> tuple[int, int]:
        """Positions of the sample at a place, 0 if it is none, and its images; by the measured lengths."""
        assert self.lengths is not None
        text, num = self.lengths.text(place, self.data), int(self.lengths.images_R[place.index])
        return (text + self.num_queries * num if text else 0), num

    def longest(self) -> np.ndarray:
        """int [records]: positions of every record at most, 0 where it is no sample."""
        assert self.lengths is not None
        text = self.lengths.longest(self.data)
        return np.where(text > 0, text + self.num_queries * self.lengths.images_R, 0)

    def usable(self, place: Place) -> Place:
        """The place, or that of the next record which is a sample as far as measuring tells."""
        assert self.lengths is not None
        known, index = self.lengths.known, place.index
        while index in known:
            index = (index + 1) % len(self)
        return place._replace(index=index)

    def _read(self, place: Place) -> Sample:
        record = self.prepared[place.index]
        chosen = place.chosen(len(record.turns), self.data.turns)
        composed = self.chat.compose(
            some_turns(record.turns, chosen.tolist()),
            num_queries=self.num_queries,
            text_length=self.data.text_length,
            num_images=len(record.images),
            name=record.image_id,
        )
        num = composed.num_images
        if num > self.data.images:
            raise _too_many(record.image_id, num, self.data.images)
        if composed.dropped:
            self.dropped_turns[place.index] = composed.dropped
        if composed.truncated:
            self.truncated_answers.add(place.index)
        labels_NL = None
        if self.patch is not None:
            labels_NL = patch_labels(record, self.labels, self.pixels.size_YX, self.patch)
        seen = [self._see(record, place.index, number) for number in range(num)]
        index = tuple(place.index + number * len(self) for number in range(num))
        grids = tuple(grid for _, grid in seen if grid is not None)
        return Sample(composed, tuple(array for array, _ in seen), index, labels_NL, grids)

    def _see(self, record: Record, index: int, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 pixels, or their cached features_NC; and the grid, where images have grids of their own."""
        if self.features is None:
            return images.of(record, self.pixels, number)
        features_NC = np.asarray(self.features(index, number))
        if np.isnan(features_NC[0, 0]):
            raise images.CorruptImage(record.image_id, "it had no readable pixels when its features were cached")
        return features_NC, self.features.grid(index, number)

    def _check(self, lengths: Lengths) -> None:
        """What measuring found out about the whole source."""
        most = int(lengths.images_R.max())
        if most > self.data.images:
            name = outline(self.prepared, int(lengths.images_R.argmax())).image_id
            raise _too_many(name, most, self.data.images)
        bad = len(lengths.known)
        if bad > self.data.max_corrupt * len(self) or bad == len(self):
            raise TooManyCorrupt(self._refusal(bad, len(self)))

    def _count(self, index: int, error: ValueError) -> None:
        name = getattr(error, "image_id", "") or self.prepared[index].image_id
        kind = {images.CorruptImage: KINDS[0], Unsupervised: KINDS[2]}.get(type(error), KINDS[1])
        with self._lock:
            self._seen[index] = True
            self.skipped[index] = (kind, name)
            bad, seen, allowed = len(self.skipped) - self._known, int(self._seen.sum()), self.data.max_corrupt
        # Three standard deviations: a healthy dataset must not stop over one unlucky batch.
        unlikely = seen >= _ENOUGH and bad > allowed * seen + 3 * (allowed * seen) ** 0.5
        if unlikely or bad > allowed * len(self):
            raise TooManyCorrupt(self._refusal(bad, seen)) from error

    def _refusal(self, bad: int, seen: int) -> str:
        return (
            f"{bad} of {seen} samples read from {self.prepared.folder} ({self.prepared.split}, {len(self)} records) "
            f"cannot be used, more than max_corrupt={self.data.max_corrupt} allows: {self._named()}. "
            f"Run `tcjax data verify`, repair what it names, raise text_length where no answer fits, or raise max_corrupt."
        )

    def _named(self) -> str:
        """The first names of every kind."""
        skipped = sorted(self.skipped.values())
        by_kind = {kind: [name for of, name in skipped if of == kind][:8] for kind in KINDS}
        return ", ".join(f"{kind} {names}" for kind, names in by_kind.items() if names)


def patch_labels(record: Record, labels: tuple[str, ...], size_YX: tuple[int, int], patch: int) -> np.ndarray:
    """int32 labels_NL: for each patch, row-major, 1 + the label of the cell its centre lies in, 0 where empty."""
    grids = [np.asarray(record.fields[name]) for name in labels]
    rows, columns = grids[0].shape
    Y, X = size_YX
    H, W = Y // patch, X // patch
    row_N = ((np.arange(H) + 0.5) * patch * rows / Y).astype(int).repeat(W)
    column_N = np.tile(((np.arange(W) + 0.5) * patch * columns / X).astype(int), H)
    return np.stack([grid[row_N, column_N] + 1 for grid in grids], axis=-1).astype(np.int32)


class ArrayFeatures:
    """One source's cached features as one array [records, N, C], one image per record."""

    def __init__(self, features: np.ndarray, prepared: Records):
        if len(features) != len(prepared):
            raise ValueError(f"{len(features)} cached features for the {len(prepared)} records of {prepared.split}.")
        self._features, self.shape, self.dtype = features, features.shape[1:], features.dtype
        self._folder: Path = prepared.folder

    def __call__(self, index: int, number: int) -> np.ndarray:
        if number:
            raise ValueError(
                f"image {number} of record {index} of {self._folder} has no features: one per record is cached."
            )
        return self._features[index]

    def grid(self, index: int, number: int) -> None:
        """Every image has the same grid."""


def _too_many(name: str, num: int, allowed: int) -> TooManyImages:
    return TooManyImages(
        f"sample {name!r} has {_SPELT.get(num, num)} images where {_SPELT.get(allowed, allowed)} "
        f"{'is' if allowed == 1 else 'are'} allowed: raise DataConfig.images to {num}, or leave such samples out."
    )


_SPELT = {1: "one", 2: "two", 3: "three", 4: "four"}
