"""Training curves: one panel per family, one line per run, darker for fewer tokens; runs still falling are dashed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tcjax.study.plots import DPI, INK, colours, save, style
from tcjax.study.rows import Row

Metrics = dict[str, list[dict[str, Any]]]  # {run: lines of its metrics.jsonl}

_SMOOTH = 0.04  # the running mean covers this share of the steps
_LABEL = 0.075  # height of a line of text as a share of a panel


def training(rows: list[Row], metrics: Metrics, path: Path) -> Path | None:
    """Loss against step, raw pale and its running mean bold; None if no run left any metrics."""
    trained = [row for row in rows if len(_finite(metrics.get(row["run"], []))[0]) > 1]
    if not trained:
        return None
    names = list(dict.fromkeys(row["compressor"] for row in trained))
    columns = min(len(names), 2 if len(names) == 4 else 3)
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.9 * lines + 0.2), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    losses = np.concatenate([_finite(metrics[row["run"]])[1] for row in trained])
    low, high = max(losses.min(), 1e-6) / 1.1, losses.max() * 1.1
    for axes, family in zip(panels, names, strict=False):
        axes.set_title(family, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.set_xlabel("step", fontsize=9, color=INK)
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(_steps(low, high)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        style(axes)
        members = [row for row in trained if row["compressor"] == family]
        axes.set_xlim(0, max(metrics[row["run"]][-1]["step"] for row in members))
        axes.locator_params(axis="x", nbins=5)
        _panel(axes, members, metrics, colours(rows)[family])
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("loss, nats per token", fontsize=9.5, color=INK)
    return save(figure, path)


def _panel(axes: Axes, members: list[Row], metrics: Metrics, colour: str) -> None:
    """The curves of one family, each Q named at its right end."""
    tokens = sorted({row["visual_tokens"] for row in members})
    ends: dict[int, list[float]] = {}
    for row in members:
        step, loss = _finite(metrics[row["run"]])
        shade, falling = _shade(colour, row["visual_tokens"], tokens), row.get("converged") is False
        smooth = _running_mean(loss, max(3, round(len(loss) * _SMOOTH)))
        axes.plot(step, loss, color=shade, linewidth=0.6, alpha=0.25)
        axes.plot(step, smooth, color=shade, linewidth=1.6, linestyle=(0, (3, 1.2)) if falling else "-")
        ends.setdefault(row["visual_tokens"], []).append(float(smooth[-1]))
    low, high = axes.get_ylim()
    heights = {Q: math.log(float(np.mean(ends[Q])) / low) / math.log(high / low) for Q in ends}
    for Q, height in spread(heights, _LABEL).items():
        falling = [row for row in members if row["visual_tokens"] == Q and row.get("converged") is False]
        axes.annotate(
            f"{Q} tokens" + (" ⚠" if falling else ""),
            (1, heights[Q]),
            xytext=(1.04, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=_shade(colour, Q, tokens),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": _shade(colour, Q, tokens),
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def spread(heights: dict[int, float], gap: float) -> dict[int, float]:
    """The same keys at heights at least `gap` apart, in the same order, moved as little as pushing upwards allows."""
    placed: dict[int, float] = {}
    for key in sorted(heights, key=heights.__getitem__):
        placed[key] = max(heights[key], max(placed.values(), default=-math.inf) + gap)
    excess = max(placed.values(), default=0.0) - 1
    return {key: height - max(excess, 0.0) for key, height in placed.items()}


def _finite(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses that a logarithmic axis can show."""
    pairs = [(line["step"], line["loss"]) for line in lines if math.isfinite(line["loss"]) and line["loss"] > 0]
    step, loss = np.array(pairs, float).reshape(-1, 2).T
    return step, loss


def _running_mean(loss: np.ndarray, window: int) -> np.ndarray:
    """Centred, over fewer values at both ends."""
    kernel = np.ones(min(window, len(loss)))
    return np.convolve(loss, kernel, "same") / np.convolve(np.ones(len(loss)), kernel, "same")


def _shade(colour: str, Q: int, tokens: list[int]) -> tuple[float, ...]:
    """Paler for more tokens."""
    pale = 0.5 * tokens.index(Q) / max(len(tokens) - 1, 1)
    return tuple(channel + (1 - channel) * pale for channel in to_rgb(colour))


def _steps(low: float, high: float) -> list[float]:
    """1-2-5 steps inside the axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step for step in (m * 10.0**d for d in decades for m in (1, 2, 5)) if low <= step <= high]
