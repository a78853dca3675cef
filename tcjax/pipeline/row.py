"""Composed samples and their images -> one row of a Batch -> a Batch.

    | sample 1: text, Q positions per image, text | sample 2 ... | padding |        S positions
    | its images | ... | blank |                                                    R image slots

A sample's own order of text and image positions stays, so the running count of image positions finds the row's images.
The first position of a packed sample is never a target: alone in a row, nothing would predict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from tcjax.batch import OF_ROWS, Batch
from tcjax.config import Pixels
from tcjax.pipeline.chat import Composed, fitted

BLANK = -1  # index_B of an image slot that no sample fills


class Features(Protocol):
    """The cached tower tokens of a source's images. shape: (N, C). A row of NaN stands for an unreadable image."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __call__(self, index: int, number: int) -> np.ndarray:
        """[N, C] of image `number` of record `index`."""
        ...

    def grid(self, index: int, number: int) -> np.ndarray | None:
        """int32 rows and columns of its own patches, None where every image has the same grid."""
        ...


class Sample(NamedTuple):
    """seen: per image its uint8 pixels, or its cached [N, C]. index: per image, as in `Batch.index_B`. grids: per image
    rows and columns of its own patches, for a tower that reads images of any shape."""

    composed: Composed
    seen: tuple[np.ndarray, ...]
    index: tuple[int, ...]
    labels_NL: np.ndarray | None = None
    grids: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How samples lie in a row.

    slots: image slots of a row (R). parts: what `segment_BS` tells apart.
    instruction_length: positions of an image's instruction; 0: no compressor asks for one.
    features: given, `Sample.seen` holds cached tokens of this shape, else pixels.
    """

    pixels: Pixels
    pad_id: int
    slots: int = 1
    parts: Literal["", "turns", "samples"] = ""
    instruction_length: int = 0
    features: Features | None = None

    def row(self, samples: Sequence[Sample], length: int) -> Batch:
        """The row that `samples` make, padded on the right to `length` positions; image fields have R leading."""
        tokens_S, segment_S = np.full(length, self.pad_id, np.int32), np.zeros(length, np.int32)
        is_image_S, supervised_S, valid_S = (np.zeros(length, bool) for _ in range(3))
        start = 0
        for number, sample in enumerate(samples, 1):
            row = sample.composed
            end = start + len(row.ids)
            assert end <= length, (end, length, sample.index)
            tokens_S[start:end], is_image_S[start:end], supervised_S[start:end] = row.ids, row.is_image, row.supervised
            supervised_S[start], valid_S[start:end] = False, True
            segment_S[start:end] = number if self.parts == "samples" else row.turn
            start = end
        seen = [array for sample in samples for array in sample.seen]
        index = [place for sample in samples for place in sample.index]
        free = self.slots - len(seen)
        assert free >= 0, (len(seen), self.slots)
        shape, dtype = (
            (self.pixels.shape, np.uint8) if self.features is None else (self.features.shape, self.features.dtype)
        )
        seen_R = np.stack(seen + free * [np.zeros(shape, dtype)])
        labels = [sample.labels_NL for sample in samples if sample.labels_NL is not None]
        grids_R2 = None
        if self.pixels.geometry == "naflex":
            grids_R2 = np.stack([grid for sample in samples for grid in sample.grids] + free * [np.zeros(2, np.int32)])
        return Batch(
            tokens_BS=tokens_S,
            is_image_BS=is_image_S,
            supervised_BS=supervised_S,
            valid_BS=valid_S,
            segment_BS=segment_S if self.parts else None,
            instruction_BT=self._instructions(samples, free) if self.instruction_length else None,
            index_B=np.array(index + free * [BLANK], np.int32),
            images_BYX3=seen_R if self.features is None else None,
            grids_B2=grids_R2,
            features_BNC=None if self.features is None else seen_R,
            patch_labels_BNL=np.stack(labels) if labels else None,
        )

    def batch(self, rows: Sequence[Batch]) -> Batch:
        """Rows -> Batch."""
        columns = {}
        for name in Batch._fields:
            values = [getattr(row, name) for row in rows]
            join = np.stack if name in OF_ROWS else np.concatenate
            columns[name] = None if values[0] is None else join(values)
        return Batch(**columns)

    def _instructions(self, samples: Sequence[Sample], free: int) -> np.ndarray:
        """instruction_RT: every image is told its own sample's questions."""
        told = [sample.composed.instruction for sample in samples for _ in sample.seen] + free * [()]
        return np.stack([fitted(ids, self.instruction_length) for ids in told])
