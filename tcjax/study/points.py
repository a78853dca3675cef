"""Rows of several seeds become one point per (compressor, Q): means with intervals, for plots, tables and words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tcjax.evaluate.scores import CAPTION, mean_tasks, retention
from tcjax.evaluate.statistics import Estimate, over_seeds, over_tasks_and_seeds
from tcjax.study.rows import Row


@dataclass(frozen=True)
class Point:
    """One compressor at one number of visual tokens Q; rows: one per seed."""

    compressor: str
    visual_tokens: int
    ratio: float
    rows: tuple[Row, ...]

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks that every seed answered."""
        return [task for task in self.rows[0]["accuracy"] if all(task in row["accuracy"] for row in self.rows)]

    @cached_property
    def accuracy(self) -> dict[str, Estimate]:
        return {task: over_seeds(self._seeds(task)) for task in self.tasks}

    @cached_property
    def mean_accuracy(self) -> Estimate:
        """Over all tasks but the caption."""
        runs = zip(*(self._seeds(task) for task in mean_tasks(self.accuracy)), strict=True)
        return over_tasks_and_seeds(list(runs))

    @cached_property
    def caption(self) -> float | None:
        """Token accuracy of the caption, if the rows know it."""
        known = [row["token_accuracy"][CAPTION] for row in self.rows if CAPTION in (row.get("token_accuracy") or {})]
        return float(np.mean(known)) if len(known) == len(self.rows) else None

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    @property
    def converged(self) -> bool | None:
        """False if any seed was not; None if nobody knows."""
        verdicts = {row.get("converged") for row in self.rows}
        return False if False in verdicts else True if True in verdicts else None

    @property
    def is_reference(self) -> bool:
        """Nothing was compressed."""
        return self.ratio == 1

    def cost(self, key: str) -> float | None:
        """Mean over the seeds of a number in the row; None if a row lacks it."""
        known = [float(row[key]) for row in self.rows if row.get(key) is not None]
        return float(np.mean(known)) if len(known) == len(self.rows) else None

    def keeps(self, reference: Point) -> float | None:
        """Retention of the reference's accuracy."""
        theirs = {task: estimate.mean for task, estimate in reference.accuracy.items()}
        return retention({task: estimate.mean for task, estimate in self.accuracy.items()}, theirs)

    def _seeds(self, task: str) -> list[Estimate]:
        return [Estimate(**row["accuracy"][task]) for row in self.rows]


def points(rows: list[Row]) -> list[Point]:
    """Sorted by family, then from many tokens to few; the families in the order of the study."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["compressor"], int(row["visual_tokens"])), []).append(row)
    order = {family: i for i, family in enumerate(dict.fromkeys(row["compressor"] for row in rows))}
    made = [Point(family, Q, float(group[0]["ratio"]), tuple(group)) for (family, Q), group in groups.items()]
    return sorted(made, key=lambda point: (order[point.compressor], -point.visual_tokens))


def families(all_points: list[Point]) -> dict[str, list[Point]]:
    """{compressor: its points}."""
    grouped: dict[str, list[Point]] = {}
    for point in all_points:
        grouped.setdefault(point.compressor, []).append(point)
    return grouped


def reference(all_points: list[Point]) -> Point | None:
    """The uncompressed point; the best of them if there are several."""
    whole = [point for point in all_points if point.is_reference]
    return max(whole, key=lambda point: point.mean_accuracy.mean, default=None)


def tasks(rows: list[Row]) -> list[str]:
    """All tasks in the order of their first appearance."""
    return list(dict.fromkeys(task for row in rows for task in row["accuracy"]))


def chance(rows: list[Row], task: str) -> float | None:
    """What guessing without the image scores, as far as the rows know it."""
    return next((row["chance"][task] for row in rows if task in (row.get("chance") or {})), None)
