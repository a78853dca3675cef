"""Several conversations in one row: best fit over windows of the global order.

Positions w W ... (w + 1) W - 1 of the endless stream are one window. Its samples, the largest first, each go into the
fullest row that still has the positions (text, and Q per image) and the image slots; then the rows are shuffled. So the
plan is a pure function of (seed, lengths), and only the last rows of a window have more room than its samples are to
blame for. Large is what takes a large share of a row's positions and of its slots, both added: by positions alone, the
short samples come last and run out of slots.
A row's samples are segments 1, 2, ... with nothing shared: the decoder hides them from each other and starts each at
position 0. Source of the method: Krell et al. 2021, "Efficient sequence packing without cross-contamination".
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tcjax.pipeline.order import Place, Slot

WINDOW = 8192  # samples planned together
_KEPT = 3  # planned windows that are remembered: threads read ahead of the batch that is handed over
_EMPTY = 100  # windows without a single sample before it is an error


def best_fit(sizes: Sequence[int], images: Sequence[int], room: int, slots: int) -> list[list[int]]:
    """Items -> rows of items, each item in exactly one row.

    Args:
        sizes: positions of each item, at most `room`. images: image slots of each, at most `slots`.

    Returns:
        Rows in the order they were opened, items in the order they were put in. Of rows with equally little room left,
        the one with the fewest free image slots takes the item, the earlier one of several.
    """
    rows: list[list[int]] = []
    free: list[list[tuple[int, int]]] = [[] for _ in range(slots + 1)]  # by free slots: (positions left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda item: (-(sizes[item] * slots + images[item] * room), item)):
        size, wanted = sizes[item], images[item]
        found = None
        for left in range(wanted, slots + 1):
            at = bisect_left(free[left], (size, 0))
            if at < len(free[left]) and (found is None or free[left][at][0] < free[found[0]][found[1]][0]):
                found = (left, at)
        if found is None:
            rows.append([item])
            insort(free[slots - wanted], (room - size, len(rows) - 1))
        else:
            left, at = found
            positions, row = free[left].pop(at)
            rows[row].append(item)
            insort(free[left - wanted], (positions - size, row))
    return rows


class Packed:
    """The plan. Rows of window w follow those of window w - 1; `mark` remembers where the window of a row begins."""

    def __init__(
        self,
        stream: Any,
        size: Callable[[Place], tuple[int, int]],
        *,
        length: int,
        slots: int,
        seed: int,
    ):
        """
        Args:
            stream: Places by position (`global_order`).
            size: of the sample at a place, positions (0: it is left out) and images.
            length: positions of a row. slots: images of a row.
        """
        self._stream, self._size, self._window = stream, size, WINDOW
        self._length, self._slots, self._seed = length, slots, seed
        self._first, self._starts = 0, [0]  # the first window known; where it and the following ones begin, in rows
        self._plans: dict[int, list[tuple[Place, ...]]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> Slot:
        with self._lock:
            window, at = self._find(row)
            return Slot(self._plan(window)[at], self._length)

    def mark(self, row: int) -> dict[str, int]:
        with self._lock:
            window, at = self._find(row)
            return {"window": window, "window_row": row - at}

    def seek(self, mark: dict[str, int]) -> None:
        with self._lock:
            self._first, self._starts = mark["window"], [mark["window_row"]]

    def _find(self, row: int) -> tuple[int, int]:
        """The row's window and its place in there."""
        if row < self._starts[0]:
            self._first, self._starts = 0, [0]
        while row >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self._plan(self._first + len(self._starts) - 1)))
            if len(self._starts) > _EMPTY and self._starts[-1] == self._starts[-_EMPTY]:
                raise ValueError(f"{_EMPTY * self._window} samples in a row are none: no answer fits into text_length.")
        at = bisect_right(self._starts, row) - 1
        return self._first + at, row - self._starts[at]

    def _plan(self, window: int) -> list[tuple[Place, ...]]:
        if window not in self._plans:
            places = [self._stream[window * self._window + at] for at in range(self._window)]
            sized = [(place, *self._size(place)) for place in places]
            sized = [item for item in sized if item[1]]
            rows = best_fit([size for _, size, _ in sized], [n for _, _, n in sized], self._length, self._slots)
            order = np.random.default_rng([self._seed, window]).permutation(len(rows))
            while len(self._plans) >= _KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[window] = [tuple(sized[item][0] for item in rows[row]) for row in order]
        return self._plans[window]
