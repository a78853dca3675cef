"""Generated answers to figures: exact match and token accuracy per task, their mean over tasks, and retention.

exact match       the generated ids up to the end mark are the answer's ids, all of them and no more
token accuracy    matching positions / max(length of the answer, length of what was generated), pooled over a task
mean accuracy     mean of exact match over all tasks except `caption`, which hardly anybody gets right to the last
                  word; its token accuracy stands beside the mean and never in it
retention         mean over the same tasks of accuracy / accuracy of the uncompressed reference
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tcjax.evaluate.statistics import Estimate, over_tasks, proportion

CAPTION = "caption"  # the one task that is judged by token accuracy

End = int | Sequence[int]  # what closes an answer: one id, or any of several
Accuracy = dict[str, dict[str, Any]]  # {task: {mean, low, high, n}}, as rows store it


class Answer(NamedTuple):
    """One question's outcome. expected, generated: token ids; what follows an end mark does not count."""

    task: str
    expected: Sequence[int]
    generated: Sequence[int]


def is_right(answers: Sequence[Answer], end: End) -> np.ndarray:
    """bool per answer: exact match. Two runs' vectors go into `statistics.difference`."""
    return np.array([_cut(answer.expected, end) == _cut(answer.generated, end) for answer in answers], bool)


def exact_match(answers: Sequence[Answer], end: End) -> Accuracy:
    """Share of exact matches per task with Wilson's interval; tasks in the order of their first question."""
    right = is_right(answers, end)
    of_task = _by_task(answers)
    return {task: proportion(int(right[ids].sum()), len(ids))._asdict() for task, ids in of_task.items()}


def token_accuracy(answers: Sequence[Answer], end: End) -> dict[str, float]:
    """Share of positions where answer and generation agree, per task; saying too much or too little costs as well."""
    shares = {}
    for task, ids in _by_task(answers).items():
        pairs = [(_cut(answers[i].expected, end), _cut(answers[i].generated, end)) for i in ids]
        agree = sum(a == b for expected, generated in pairs for a, b in zip(expected, generated, strict=False))
        shares[task] = agree / sum(max(len(expected), len(generated)) for expected, generated in pairs)
    return shares


def mean_tasks(accuracy: Mapping[str, Any]) -> list[str]:
    """The tasks that count in the mean: all but the caption, unless there is nothing else."""
    return [task for task in accuracy if task != CAPTION] or list(accuracy)


def mean_accuracy(accuracy: Accuracy) -> Estimate:
    """Mean exact match over `mean_tasks`, every task weighing the same."""
    return over_tasks([Estimate(**accuracy[task]) for task in mean_tasks(accuracy)])


def retention(accuracy: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    """Mean over the tasks of accuracy / reference accuracy; None if the reference fails or lacks one of them."""
    tasks = mean_tasks(accuracy)
    if any(reference.get(task, 0) <= 0 for task in tasks):
        return None
    return float(np.mean([accuracy[task] / reference[task] for task in tasks]))


def _cut(ids: Sequence[int], end: End) -> list[int]:
    ends = {end} if isinstance(end, int) else set(end)
    return [int(i) for i in itertools.takewhile(lambda i: int(i) not in ends, ids)]


def _by_task(answers: Sequence[Answer]) -> dict[str, list[int]]:
    if not answers:
        raise ValueError("there are no answers to score; the evaluation source must hold at least one question.")
    of_task: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if not len(answer.expected):
            raise ValueError(
                f"question {i} ({answer.task}) has no answer to compare with; expected must hold token ids."
            )
        of_task.setdefault(answer.task, []).append(i)
    return of_task
