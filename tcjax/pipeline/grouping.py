"""Batches of like samples: with images or without, of like length, each batch only as long as its bucket.

One epoch of the endless stream (as many positions as the sources have records, in whole batches) is cut by modality, each
modality into megabatches of 50 batches, each megabatch sorted by length and cut into batches; the batches are shuffled and
the longest comes first, so that a run that will not fit into memory says so at its first step. What is left over of both
modalities makes one mixed batch. So an epoch is a permutation of the stream: mixing weights stay, nothing comes twice.

Sources: LLaVA's group_by_modality_length (haotian-liu/LLaVA, llava/train/llava_trainer.py), the megabatches of 50 of the
Hugging Face sampler it stems from, the longest batch first as in Prismatic (prismatic/util/batching_utils.py). Departures:
a batch's length is rounded up to one of a few buckets, as every length is compiled; nothing is cut by rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tcjax.pipeline.order import Place, Slot

MEGABATCH = 50  # batches that are sorted by length together
_ALIGN = 8  # a row's positions are a multiple of it, or the longest possible


def bucket_lengths(sizes: np.ndarray, num: int, longest: int) -> np.ndarray:
    """At most `num` ascending row lengths between which the records' sizes spread evenly.

    Args:
        sizes: positions of every record, of all sources; zeros are no samples.
        longest: positions a row may have at most; the last bucket is the longest record's.
    """
    quantiles = np.quantile(sizes[sizes > 0], np.arange(1, num + 1) / num, method="higher")
    return np.unique(np.minimum(-(-quantiles // _ALIGN) * _ALIGN, longest).astype(int))


def grouped(
    sizes: Sequence[int], has_image: Sequence[bool], batch: int, random: np.random.Generator
) -> list[list[int]]:
    """Items -> batches of exactly `batch` items, each item in one; their number must be a multiple of `batch`."""
    assert len(sizes) % batch == 0, (len(sizes), batch)
    batches, rest = [], []
    for modality in (True, False):
        items = [item for item in range(len(sizes)) if has_image[item] == modality]
        whole = len(items) // batch * batch
        rest += items[whole:]
        for start in range(0, whole, MEGABATCH * batch):
            lot = sorted(items[start : min(start + MEGABATCH * batch, whole)], key=lambda item: (-sizes[item], item))
            batches += [lot[first : first + batch] for first in range(0, len(lot), batch)]
    if rest:
        batches.append(rest)
    batches = [batches[at] for at in random.permutation(len(batches))]
    longest = max(range(len(batches)), key=lambda at: max(sizes[item] for item in batches[at]))
    batches[0], batches[longest] = batches[longest], batches[0]
    return batches


class Grouped:
    """The plan: rows b batch ... (b + 1) batch - 1 are batch b, all of one length."""

    def __init__(
        self,
        stream: Any,
        size: Callable[[Place], tuple[int, int]],
        *,
        records: int,
        batch: int,
        buckets: np.ndarray,
        seed: int,
    ):
        """
        Args:
            stream: Places by position (`global_order`).
            size: of the sample at a place, positions and images.
            records: of all sources together. buckets: the lengths a batch may have, ascending.
        """
        self._stream, self._size, self._buckets = stream, size, buckets
        self._batch, self._seed, self._epoch = batch, seed, max(records // batch, 1) * batch
        self._plans: dict[int, list[Slot]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> Slot:
        epoch, at = divmod(row, self._epoch)
        with self._lock:
            return self._plan(epoch)[at]

    def mark(self, row: int) -> dict[str, int]:
        return {}

    def seek(self, mark: dict[str, int]) -> None:
        pass

    def _plan(self, epoch: int) -> list[Slot]:
        if epoch not in self._plans:
            places = [self._stream[epoch * self._epoch + at] for at in range(self._epoch)]
            sizes, images = zip(*(self._size(place) for place in places), strict=True)
            random = np.random.default_rng([self._seed, epoch])
            slots = []
            for items in grouped(sizes, [n > 0 for n in images], self._batch, random):
                longest = max(sizes[item] for item in items)
                length = int(self._buckets[np.searchsorted(self._buckets, longest)])
                slots += [Slot((places[item],), length, fits=True) for item in items]
            while len(self._plans) >= 2:  # threads may read the next epoch already
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = slots
        return self._plans[epoch]
