"""The tables of a report as cells of text; markdown.py and html.py render them.

One table of points (seeds averaged) with intervals, one of their cost, one of the controls, and one of runs with
everything needed to make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tcjax.evaluate.scores import CAPTION
from tcjax.evaluate.statistics import Estimate
from tcjax.study.points import Point, chance, points, reference, tasks
from tcjax.study.rows import Row

NONE = "–"


class Sheet(NamedTuple):
    """Cells as text; a cell may have a second, smaller line after a newline."""

    header: list[str]
    lines: list[list[str]]


def results(rows: list[Row]) -> Sheet:
    """One line per (compressor, Q): retention, mean and per-task accuracy in per cent, with 95 % intervals."""
    made, names = points(rows), tasks(rows)
    whole = reference(made)
    captions = any(point.caption is not None for point in made)
    header = ["compressor", "tokens", "fewer", "seeds", "kept", "mean", *names]
    lines = [
        [
            point.compressor + (" ⚠" if point.converged is False else ""),
            str(point.visual_tokens),
            f"{point.ratio:.4g}×",
            str(len(point.rows)),
            _percent(point.keeps(whole) if whole else None),
            _estimate(point.mean_accuracy),
            *(_estimate(point.accuracy.get(task)) for task in names),
            *([_percent(point.caption)] if captions else []),
        ]
        for point in made
    ]
    for guesses in _guessing(rows, names):
        known = [guess for task, guess in zip(names, guesses, strict=True) if guess is not None and task != CAPTION]
        mean = sum(known) / len(known) if known else None
        lines.append(["chance", *[NONE] * 4, _percent(mean), *map(_percent, guesses), *[NONE] * captions])
    return Sheet(header + ["caption\nper token"] * captions, lines)


def costs(rows: list[Row]) -> Sheet:
    """One line per (compressor, Q): what it costs to run and to train."""
    columns: dict[str, Callable[[Point], str]] = {
        "compressor": lambda point: point.compressor,
        "tokens": lambda point: str(point.visual_tokens),
        "prefill GFLOP": lambda point: _number(point.cost("prefill_flops"), 1e-9),
        "KV cache KiB": lambda point: _number(point.cost("kv_bytes"), 2**-10),
        "prefill ms": lambda point: _number(point.cost("prefill_seconds"), 1e3),
        "training s": lambda point: _number(point.cost("train_seconds"), 1),
        "steps": lambda point: _number(point.cost("steps"), 1),
    }
    return _sheet(columns, points(rows))


def runs(rows: list[Row]) -> Sheet:
    """One line per run: what made it, and with what identity."""
    columns: dict[str, Callable[[Row], str]] = {
        "run": lambda row: row["run"],
        "seed": lambda row: str(row["seed"]),
        "mean": lambda row: _percent(row.get("mean_accuracy")),
        "converged": lambda row: {"True": "yes", "False": "⚠ no"}.get(str(row.get("converged")), NONE),
        "commit": lambda row: row.get("commit") or NONE,
        "fingerprint": lambda row: row["fingerprint"],
        "date": lambda row: row.get("date") or NONE,
        "hardware": lambda row: row.get("hardware") or NONE,
        "command": lambda row: row.get("command") or NONE,
        "artifact": lambda row: row.get("artifact") or NONE,
    }
    return _sheet(columns, rows)


def controls(rows: list[Row]) -> Sheet | None:
    """Accuracy without the right image, per run and control; None if no run has any."""
    names = tasks(rows)
    lines = [
        [row["compressor"], str(row["visual_tokens"]), str(row["seed"]), control]
        + [_estimate(Estimate(**scores[task]) if task in scores else None) for task in names]
        for row in rows
        for control, scores in (row.get("controls") or {}).items()
    ]
    if not lines:
        return None
    lines += [["chance", NONE, NONE, NONE, *map(_percent, guesses)] for guesses in _guessing(rows, names)]
    return Sheet(["compressor", "tokens", "seed", "image", *names], lines)


def _guessing(rows: list[Row], names: list[str]) -> Iterator[list[float | None]]:
    """Once what chance alone would score per task, if any row knows it."""
    guesses = [chance(rows, task) for task in names]
    if any(guess is not None for guess in guesses):
        yield guesses


def _sheet(columns: dict[str, Callable[[Any], str]], items: Iterable[Any]) -> Sheet:
    return Sheet(list(columns), [[cell(item) for cell in columns.values()] for item in items])


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def _estimate(estimate: Estimate | None) -> str:
    return (
        NONE if estimate is None else f"{100 * estimate.mean:.1f}\n{100 * estimate.low:.1f}–{100 * estimate.high:.1f}"
    )


def _number(value: float | None, scale: float) -> str:
    return NONE if value is None else f"{value * scale:,.4g}" if value * scale < 1e4 else f"{value * scale:,.0f}"
