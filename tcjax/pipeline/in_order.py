"""A function over many indices by several threads, results in order, only a few ahead of what was taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_order(read: Callable[[int], T], indices: Iterable[int], threads: int) -> Iterator[T]:
    """read(i) of every index, in the order given. threads: 0 or 1 reads in the caller's own."""
    if threads <= 1:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for index in indices:
                ahead.append(pool.submit(read, index))
                if len(ahead) > 4 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()
