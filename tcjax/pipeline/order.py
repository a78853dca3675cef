"""Which sample comes when: position of the endless stream -> `Place`, a pure function of (seed, number of records).

    every source: shuffle, reshuffle per epoch  ->  mix by weight  ->  position 0, 1, 2, ...

A `Plan` says which samples make up which row of the stream of rows; the three are here ("rows": a sample is a row),
in grouping.py and in packing.py. None knows how many processes there are: process p of P takes the rows p, p + P, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from tcjax.config import Source


class Place(NamedTuple):
    """A sample's coming up: the source it is from, its record there, and what its turns are drawn by.

    draw: key and counter of the Philox generator that chooses turns; None takes all.
    """

    source: int
    index: int
    draw: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def chosen(self, num: int, wanted: int) -> np.ndarray:
        """Which of `num` turns come up, in their order: `wanted` of them if the turns are drawn, else all."""
        if self.draw is None or num <= wanted:
            return np.arange(num)
        key, counter = (np.array(words, np.uint64) for words in self.draw)
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return np.sort(random.permutation(num)[:wanted])


class Slot(NamedTuple):
    """One row to be: its samples, and its positions S. fits: another sample may take the place only if it fits too."""

    places: tuple[Place, ...]
    length: int
    fits: bool = False


class Plan(Protocol):
    """Rows of the endless stream by random access, safe for threads.

    mark, seek: a few integers from which `row` is found without planning everything before it.
    """

    def __getitem__(self, row: int) -> Slot: ...
    def mark(self, row: int) -> dict[str, int]: ...
    def seek(self, mark: dict[str, int]) -> None: ...


def global_order(sizes: Sequence[int], sources: Sequence[Source], *, seed: int, turns: int) -> Any:
    """The endless stream of Places, by random access: a grain MapDataset.

    Args:
        sizes: records of each source.
        turns: 0, or so many turns are drawn of every conversation, anew each time it comes up.
    """
    streams = []
    for source, size in enumerate(sizes):
        own = int(np.random.SeedSequence([seed, source]).generate_state(1)[0])
        stream = grain.MapDataset.range(size).shuffle(seed=own).repeat()
        place = _Placing(source)
        streams.append(stream.random_map(place.drawing, seed=own) if turns else stream.map(place.whole))
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, weights=[source.weight for source in sources])


class _Placing:
    def __init__(self, source: int):
        self._source = source

    def whole(self, index: int) -> Place:
        return Place(self._source, int(index))

    def drawing(self, index: int, random: np.random.Generator) -> Place:
        state: Any = random.bit_generator.state["state"]
        return Place(self._source, int(index), (tuple(state["key"].tolist()), tuple(state["counter"].tolist())))


class InOrder:
    """Every sample is a row of its own, of the same length: the stream as it is."""

    def __init__(self, stream: Any, length: int):
        self._stream, self._length = stream, length

    def __getitem__(self, row: int) -> Slot:
        return Slot((self._stream[row],), self._length)

    def mark(self, row: int) -> dict[str, int]:
        return {}

    def seek(self, mark: dict[str, int]) -> None:
        pass
