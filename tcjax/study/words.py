"""The study in sentences: what each family keeps at each Q, who leads, and which task falls first.

A difference is called one where the paired 95 % interval leaves out 0, or, for lack of the single answers, where the
two 95 % intervals do not overlap, which is stricter.
"""

from __future__ import annotations

from tcjax.evaluate.scores import CAPTION
from tcjax.evaluate.statistics import Estimate
from tcjax.study.paired import Verdicts, gain
from tcjax.study.points import Point, chance, families, points, reference
from tcjax.study.rows import Row


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def headline(rows: list[Row], verdicts: dict[str, Verdicts]) -> list[str]:
    """One sentence on the reference, one per compressing family, one per Q that several families share.

    verdicts: of each run that left its answers, {run: {question: right}}.
    """
    made = points(rows)
    whole = reference(made)
    sentences = []
    if whole:
        mean = whole.mean_accuracy
        sentences.append(
            f"Without compression, {whole.compressor} hands the LLM {whole.visual_tokens} visual tokens: mean accuracy "
            f"over the tasks {percent(mean.mean)} (95 % interval {_interval(mean)})."
        )
    for family, its_points in families(made).items():
        squeezed = [point for point in its_points if not point.is_reference]
        if squeezed:
            sentences.append(_family(family, squeezed, whole) + _first_to_fall(squeezed, whole, rows))
    return sentences + _duels(made, verdicts)


def first_to_fall(squeezed: list[Point], whole: Point, rows: list[Row]) -> tuple[Point, str] | None:
    """At the mildest compression that costs any task something: the point, and the task that lost most of what it had
    above chance. None if no task is measurably below the reference."""
    for point in sorted(squeezed, key=lambda point: -point.visual_tokens):
        lost = {}
        for task, estimate in point.accuracy.items():
            theirs, guess = whole.accuracy.get(task), chance(rows, task) or 0.0
            if task != CAPTION and theirs and estimate.high < theirs.low and theirs.mean > guess:
                lost[task] = (theirs.mean - estimate.mean) / (theirs.mean - guess)
        if lost:
            return point, max(lost, key=lost.__getitem__)
    return None


def _family(family: str, squeezed: list[Point], whole: Point | None) -> str:
    parts = []
    for i, point in enumerate(squeezed):
        kept = point.keeps(whole) if whole else None
        absolute = f"mean {percent(point.mean_accuracy.mean)}"
        said = absolute if kept is None else percent(kept, 0) + (" of the reference's accuracy" if i == 0 else "")
        facts = [] if kept is None else [absolute]
        parts.append(f"{said} at {point.visual_tokens} tokens ({', '.join([*facts, f'{point.ratio:.4g}× fewer'])})")
    return f"{family} {'reaches' if whole is None else 'keeps'} {_and(parts)}."


def _first_to_fall(squeezed: list[Point], whole: Point | None, rows: list[Row]) -> str:
    if whole is None:
        return ""
    found = first_to_fall(squeezed, whole, rows)
    if found is None:
        return " No task falls measurably below the reference."
    point, task = found
    before, after = whole.accuracy[task].mean, point.accuracy[task].mean
    return f" First to fall is {task}: from {percent(before)} to {percent(after)} at {point.visual_tokens} tokens."


def _duels(made: list[Point], verdicts: dict[str, Verdicts]) -> list[str]:
    """At every Q that several families share: the best against the second."""
    sentences = []
    for Q in sorted({point.visual_tokens for point in made}, reverse=True):
        rivals = sorted((p for p in made if p.visual_tokens == Q and not p.is_reference), key=_mean, reverse=True)
        if len(rivals) > 1:
            best, second = rivals[:2]
            means = f"{best.compressor} has {percent(_mean(best))} and {second.compressor} {percent(_mean(second))}"
            sentences.append(f"At {Q} tokens, {means}: {_verdict(best, second, verdicts)}.")
    return sentences


def _verdict(best: Point, second: Point, verdicts: dict[str, Verdicts]) -> str:
    paired = gain(best, second, verdicts)
    if paired is None:
        ahead = best.mean_accuracy.low > second.mean_accuracy.high
        return f"{best.compressor} is ahead, the intervals do not overlap" if ahead else "the intervals overlap"
    low, high = 100 * paired.low, 100 * paired.high
    said = f"{best.compressor} is ahead" if paired.low > 0 else "no measurable difference"
    return f"{said} on the same questions (paired 95 % interval of the difference {low:.1f} to {high:.1f} points)"


def _mean(point: Point) -> float:
    return point.mean_accuracy.mean


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.1f}–{100 * estimate.high:.1f}"


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
