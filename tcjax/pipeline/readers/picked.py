"""Some rows of a source, and several sources end to end.

    pick("first:1000", n)   rows 0 ... 999        pick("random:10%", n, seed)   ceil(n / 10) rows drawn by the seed
    pick("end:10%", n)      the last ceil(n / 10)  pick("all", n)                every row

Counts are LLaVA-NeXT's (llava/train/train.py), which also takes all rows where fewer are there than asked for. Its `random`
shuffles with whatever state Python's generator is in, on every host anew; ours is a function of the seed and keeps the
file's order. What that code takes in silence, an unknown word, no number, 0 (`end:0` is everything there), is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tcjax.pipeline.sample import Outline, Record, Records, image_names, outline


def pick(sampling: str, total: int, seed: int = 0) -> np.ndarray | None:
    """int64 indices of the rows that `sampling` keeps, ascending; None for all of them in place."""
    if sampling == "all":
        return None
    found = re.fullmatch(r"(first|end|random):(\d+)(%?)", sampling)
    if not found or not int(found[2]):
        raise ValueError(
            f"sampling {sampling!r} is unknown; possible: all, first:N, end:N, random:N with a whole N from 1 up, "
            f"or a share such as random:10%."
        )
    number = math.ceil(int(found[2]) * total / 100) if found[3] else int(found[2])
    number = min(number, total)
    if found[1] == "first":
        return np.arange(number)
    if found[1] == "end":
        return np.arange(total - number, total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:number])


class Picked:
    """The rows `index` of `whole`."""

    def __init__(self, whole: Records, index: np.ndarray, sampling: str):
        self.whole, self.index = whole, index
        self.name, self.folder, self.split = f"{whole.name} {sampling}", whole.folder, whole.split

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Record:
        return self.whole[int(self.index[index])]

    def outline(self, index: int) -> Outline:
        return outline(self.whole, int(self.index[index]))

    def image_names(self, index: int) -> list[str]:
        """As the whole source calls them, if it does."""
        return image_names(self.whole, int(self.index[index]))

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.whole.label_names


class Joined:
    """Several sources as one, each row once: what LLaVA-NeXT's mixture file means."""

    def __init__(self, parts: Sequence[Records], folder: Path, split: str):
        self.parts, self.folder, self.split, self.name = list(parts), folder, split, folder.stem
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        part, at = self._place(index)
        return part[at]

    def outline(self, index: int) -> Outline:
        return outline(*self._place(index))

    def image_names(self, index: int) -> list[str]:
        """As the part calls them, if it does."""
        return image_names(*self._place(index))

    def _place(self, index: int) -> tuple[Records, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - int(self._ends[part]) + len(self.parts[part])

    @property
    def label_names(self) -> tuple[str, ...]:
        """Dense labels that every part has."""
        shared = set(self.parts[0].label_names).intersection(*(part.label_names for part in self.parts))
        return tuple(name for name in self.parts[0].label_names if name in shared)


def picked(whole: Records, sampling: str, seed: int = 0) -> Records:
    """`whole` itself if everything is wanted."""
    index = pick(sampling, len(whole), seed)
    return whole if index is None else Picked(whole, index, sampling)
