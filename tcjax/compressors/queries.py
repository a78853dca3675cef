"""How many tokens come out: which Q a compressor can have on a grid, and what becomes of its config at another Q."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from tcjax.compressors.base import CompressorConfig, Widths, one_image


@dataclass(frozen=True, kw_only=True)
class GridConfig(CompressorConfig):
    """Of a compressor whose outputs lie on a smaller grid. num_queries: h * w. shape: (h, w); None takes the square."""

    num_queries: int
    shape: tuple[int, int] | None = None

    def outputs(self, widths: Widths) -> int:
        return math.prod(self.out_grid(widths))

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return pooled_shape(self.num_queries, self.shape, widths)

    def at(self, num_queries: int) -> Self:
        if self.elastic == "no":
            return super().at(num_queries)
        return replace(self, num_queries=num_queries, shape=None)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(CompressorConfig):
    """Of a compressor with learned queries. num_queries: those used, the first ones.

    max_queries: those with weights; None means exactly num_queries.
    """

    num_queries: int
    max_queries: int | None = None
    elastic = "masked prefix"

    def outputs(self, widths: Widths) -> int:
        self.weighted()
        return self.num_queries

    def weighted(self) -> int:
        """How many queries have weights; ValueError if there are fewer than num_queries."""
        most = self.num_queries if self.max_queries is None else self.max_queries
        if not 1 <= self.num_queries <= most:
            raise ValueError(
                f"num_queries={self.num_queries}: must be any whole number from 1 up to max_queries={most}."
            )
        return most

    def at(self, num_queries: int) -> Self:
        return replace(self, num_queries=num_queries, max_queries=self.max_queries or self.num_queries)


def pooled_shape(num_queries: int, shape: tuple[int, int] | None, widths: Widths) -> tuple[int, int]:
    """(h, w) with h * w = num_queries on this grid, the square if `shape` is None; ValueError naming the possible."""
    H, W = one_image(widths)
    if shape is None:
        side = math.isqrt(max(num_queries, 0))
        if side * side != num_queries or not 1 <= side <= min(H, W):
            squares = [side**2 for side in range(1, min(H, W) + 1)]
            raise refuse_queries(num_queries, widths, "a square pooling (shape=(h, w) gives others)", squares)
        return side, side
    height, width = shape
    if not (1 <= height <= H and 1 <= width <= W):
        raise ValueError(f"shape={shape} is not a pooling of a {H}x{W} grid; possible: (1, 1) to ({H}, {W}).")
    if height * width != num_queries:
        possible = [(h, num_queries // h) for h in range(1, H + 1) if num_queries % h == 0]
        possible = [(h, w) for h, w in possible if 1 <= w <= W]
        raise ValueError(
            f"shape={shape} has {height * width} tokens, num_queries={num_queries}: say the same number "
            f"twice; possible shapes for {num_queries} on a {H}x{W} grid: {possible}."
        )
    return height, width


def merge_factor(num_queries: int, widths: Widths, rule: str = "a whole s x s merge") -> int:
    """s with num_queries = H / s * W / s on this grid; ValueError naming the possible numbers."""
    H, W = one_image(widths)
    sides = math.gcd(H, W)
    queries = {H * W // s**2: s for s in range(1, sides + 1) if sides % s == 0}
    if num_queries not in queries:
        raise refuse_queries(num_queries, widths, rule, queries)
    return queries[num_queries]


def refuse_queries(num_queries: int, widths: Widths, rule: str, possible: Iterable[int]) -> ValueError:
    """The error for a Q that cannot be had: the rule, the values, the way out."""
    height, width = widths.grid_HW
    return ValueError(
        f"num_queries={num_queries} is not {rule} of a {height}x{width} grid; possible: {sorted(set(possible))}."
    )
