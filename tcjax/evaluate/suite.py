"""The benchmarks by name, their scores with intervals, and two runs' answers compared.

    score      questions and predictions -> every metric of the suite, the headline with its 95 % interval, each answer
    compare    two runs' judged answers  -> difference of the headline, paired, with its interval

Wilson's interval where the headline is a share of right answers and every question has an image of its own; otherwise a
bootstrap that resamples whole images, because their questions stand or fall together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tcjax.evaluate.statistics import Estimate, proportion, resampled
from tcjax.evaluate.suites import coco, cub, docvqa, gqa, mme, pope, scienceqa, textvqa, vqav2
from tcjax.evaluate.suites.question import Judged, Question, Suite

SUITES: dict[str, Any] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "docvqa": docvqa,
    "pope": pope,
    "mme": mme,
    "coco": coco,
    "scienceqa": scienceqa,
    "cub": cub,
}


class Report(NamedTuple):
    """headline: the suite's one figure; metrics: all of them, by name; each: one per question, in their order."""

    headline: Estimate
    metrics: dict[str, float]
    each: list[Judged]


def suite(name: str) -> Suite:
    if name not in SUITES:
        raise ValueError(f"benchmark {name!r} is unknown; choose one of {', '.join(SUITES)}.")
    return SUITES[name]


def check_mode(name: str, mode: str) -> str:
    """The mode, the suite's first if it is ""; ValueError lists those the suite knows."""
    modes = suite(name).MODES
    if mode and mode not in modes:
        raise ValueError(f"{name} has no mode {mode!r}; choose one of {', '.join(modes)}.")
    return mode or modes[0]


def score(name: str, questions: Sequence[Question], predictions: Sequence[str], mode: str = "") -> Report:
    """Judge the predictions, one per question in their order.

    Raises:
        ValueError: unknown suite or mode, another number of predictions, or a split whose answers are not published.
    """
    mode, which = check_mode(name, mode), suite(name)
    if len(questions) != len(predictions) or not questions:
        raise ValueError(
            f"{len(questions)} questions and {len(predictions)} predictions: give one each, and at least one."
        )
    if any(not question.truths for question in questions):
        raise ValueError(f"the answers of this split of {name} are not published; submit the predictions instead.")
    each = which.judge(questions, predictions, mode)
    metrics = which.metrics(_sums([judged.parts for judged in each]), mode)
    clusters = [question.cluster for question in questions]
    return Report(headline(name, each, clusters, mode), metrics, each)


def headline(name: str, each: Sequence[Judged], clusters: Sequence[str], mode: str) -> Estimate:
    which = suite(name)
    counts, parts_GK = _matrix(which, each, clusters)
    if which.HEADLINE in counts and len(set(clusters)) == len(each) and _is_share(which, each):
        right, asked = (parts_GK[:, counts.index(part)].sum() for part in (which.HEADLINE, f"{which.HEADLINE}#"))
        share = proportion(right, int(asked))
        return Estimate(100 * share.mean, 100 * share.low, 100 * share.high, share.n)

    def figure(sums_RK: np.ndarray) -> np.ndarray:
        return which.metrics(dict(zip(counts, sums_RK.T, strict=True)), mode)[which.HEADLINE]

    mean, low, high = resampled(parts_GK, figure)
    return Estimate(mean, low, high, len(each))


def compare(
    name: str, a: Sequence[Judged], b: Sequence[Judged], clusters: Sequence[str], mode: str
) -> tuple[Estimate, Estimate, Estimate]:
    """Headlines of both and of a minus b, the last paired: both runs' answers to an image are drawn together."""
    which = suite(name)
    counts = sorted(set(_matrix(which, a, clusters)[0]) | set(_matrix(which, b, clusters)[0]))
    parts_GK = np.concatenate([_matrix(which, each, clusters, counts)[1] for each in (a, b)], axis=1)
    K = len(counts)

    def gain(sums_RK: np.ndarray) -> np.ndarray:
        first, second = (dict(zip(counts, half.T, strict=True)) for half in (sums_RK[:, :K], sums_RK[:, K:]))
        return which.metrics(first, mode)[which.HEADLINE] - which.metrics(second, mode)[which.HEADLINE]

    mean, low, high = resampled(parts_GK, gain)
    both = (headline(name, each, clusters, mode) for each in (a, b))
    return (*both, Estimate(mean, low, high, len(a)))  # pyright: ignore[reportReturnType]


def _sums(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for some in parts:
        for name, value in some.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _matrix(
    which: Suite, each: Sequence[Judged], clusters: Sequence[str], counts: list[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """The parts the headline reads, and their sums per image, [G, K]."""
    if counts is None:
        names = {name for judged in each for name in judged.parts}
        counts = sorted(name for name in names if name.startswith(which.HEADLINE_PARTS))
    place = {name: column for column, name in enumerate(counts)}
    rows = {cluster: row for row, cluster in enumerate(dict.fromkeys(clusters))}
    sums_GK = np.zeros((len(rows), len(counts)))
    for judged, cluster in zip(each, clusters, strict=True):
        for name, value in judged.parts.items():
            if name in place:
                sums_GK[rows[cluster], place[name]] += value
    return counts, sums_GK


def _is_share(which: Suite, each: Sequence[Judged]) -> bool:
    return all(judged.parts.get(which.HEADLINE, 0.0) in (0.0, 1.0) for judged in each)
