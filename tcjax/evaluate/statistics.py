"""Intervals: 95 % for a share of right answers, over several seeds, over several tasks, and for a difference.

    one run, one task    Wilson's score interval over the n questions; correct near 0 and 1, where p +- 1.96 s is not
    several seeds        all seeds answer the same questions, so more seeds shrink the training noise and never the
                         question noise. Half-width = sqrt(questions^2 + seeds^2): Wilson at the mean, and Student's t
                         over the seeds' means (R - 1 degrees of freedom)
    several tasks        mean of the tasks' means; half-width = sqrt(sum of squares) / number of tasks
    two runs             bootstrap over the questions both answered, resampled together (paired), whole images at a time
    any other figure     bootstrap of the sums it is a function of, whole images at a time

Sources: Wilson 1927; Zou & Donner 2008, "Construction of confidence limits about effect measures" (separate intervals
add in quadrature, each side for itself: MOVER); Miller 2024, "Adding Error Bars to Evals" (pairing, clusters).
Departure: Wilson takes the questions of one image as independent; `difference` does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


class Estimate(NamedTuple):
    """mean with its 95 % interval [low, high]; n: questions behind it. `_asdict()` is what a row stores."""

    mean: float
    low: float
    high: float
    n: int


def proportion(right: float, n: int) -> Estimate:
    """Wilson's interval of `right` out of `n`; `right` may be a mean over seeds. 8 of 10: 0.8 in [0.490, 0.943]."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right={right} of n={n}: a proportion needs n >= 1 and 0 <= right <= n.")
    mean, z2n = right / n, _Z**2 / n
    centre = (mean + z2n / 2) / (1 + z2n)
    half = _Z / (1 + z2n) * math.sqrt(mean * (1 - mean) / n + z2n / (4 * n))
    # At 0 and 1 the formula ends there exactly; min and max take the last bit's rounding off.
    return Estimate(mean, min(max(centre - half, 0.0), mean), max(min(centre + half, 1.0), mean), n)


def over_seeds(seeds: Sequence[Estimate]) -> Estimate:
    """One task, the same questions, R seeds. One seed is itself: its interval knows nothing of training noise.

    Seeds that answered different numbers of questions count as the fewest of them.
    """
    return _widened(_pooled(seeds), _seed_half([seed.mean for seed in seeds]))


def over_tasks(tasks: Sequence[Estimate]) -> Estimate:
    """The plain mean over tasks, each weighing the same however many questions it has; n is their sum."""
    if not tasks:
        raise ValueError("the mean over no task is not defined; give at least one task's estimate.")
    means, lows, highs, ns = (np.array(column) for column in zip(*tasks, strict=True))
    mean, k = float(means.mean()), len(tasks)
    low, high = (float(np.sqrt(((means - side) ** 2).sum())) / k for side in (lows, highs))
    return Estimate(mean, max(mean - low, 0.0), min(mean + high, 1.0), int(ns.sum()))


def over_tasks_and_seeds(runs: Sequence[Sequence[Estimate]]) -> Estimate:
    """runs[seed][task]. The seeds' part comes from their own means over tasks: a bad seed is bad in all of them."""
    if len({len(run) for run in runs}) != 1:
        raise ValueError(f"every seed must have the same tasks, but they have {[len(run) for run in runs]} tasks.")
    questions = [_pooled(task) for task in zip(*runs, strict=True)]
    return _widened(over_tasks(questions), _seed_half([over_tasks(run).mean for run in runs]))


def difference(
    right_a: Sequence[bool],
    right_b: Sequence[bool],
    *,
    images: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Accuracy of a minus accuracy of b on the same questions, with a percentile interval of the paired bootstrap.

    Args:
        images: which image each question asks about; whole images are resampled, because their questions stand or fall
            together. None: every question has its own.
        weights: of each question; 1 / (number of its task's questions) makes tasks weigh the same. None: all 1.
        samples, seed: same arguments, same interval.
    """
    groups = np.arange(len(right_a)) if images is None else np.asarray(images)
    weight = np.ones(len(right_a)) if weights is None else np.asarray(weights, float)
    if not len(right_a) == len(right_b) == len(groups) == len(weight) or not len(right_a):
        raise ValueError(
            f"right_a, right_b, images, weights have {[len(right_a), len(right_b), len(groups), len(weight)]} entries; "
            f"give one entry per question, in the same order, and at least one."
        )
    gain = np.asarray(right_a, float) - np.asarray(right_b, float)
    _, group = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group, gain * weight), np.bincount(group, weight)
    rng, G = np.random.default_rng(seed), len(sums)
    means = np.empty(samples)
    for start in range(0, samples, 256):  # a few hundred resamples at once: bounded memory at any number of questions
        drawn = rng.integers(0, G, (min(256, samples - start), G))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(np.average(gain, weights=weight)), float(low), float(high), len(gain))


def resampled(
    parts_GK: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], *, samples: int = 2_000, seed: int = 0
) -> tuple[float, float, float]:
    """Any figure of sums over groups, with the percentile interval of a bootstrap over the groups.

    Args:
        parts_GK: what each of G groups (images) adds to the K sums.
        figure: sums [samples, K] -> values [samples]; a difference of two runs' figures makes the bootstrap paired.

    Returns:
        The figure of all groups, and the interval's ends.
    """
    rng, G = np.random.default_rng(seed), len(parts_GK)
    values = []
    for start in range(0, samples, 64):  # bounded memory at any number of groups
        drawn = rng.integers(0, G, (min(64, samples - start), G))
        times = np.stack([np.bincount(row, minlength=G) for row in drawn])
        values.append(figure(times @ parts_GK))
    low, high = np.quantile(np.concatenate(values), (0.025, 0.975))
    return float(figure(parts_GK.sum(0, keepdims=True))[0]), float(low), float(high)


def _pooled(seeds: Sequence[Estimate]) -> Estimate:
    """Wilson's interval at the seeds' mean, as if one run had answered the questions."""
    mean, n = float(np.mean([seed.mean for seed in seeds])), min(seed.n for seed in seeds)
    return proportion(min(mean * n, n), n)


def _seed_half(means: Sequence[float]) -> float:
    """Half-width of Student's t interval over R seeds; 0 for one, about whom nothing is known."""
    R = len(means)
    if R < 2:
        return 0.0
    return float(stats.t.ppf(0.975, R - 1)) * float(np.std(means, ddof=1)) / math.sqrt(R)


def _widened(estimate: Estimate, half: float) -> Estimate:
    """Another independent source of error, as wide as `half` on both sides."""
    mean, low, high, n = estimate
    return Estimate(
        mean, max(mean - math.hypot(mean - low, half), 0.0), min(mean + math.hypot(high - mean, half), 1.0), n
    )
