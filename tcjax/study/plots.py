"""The figures of a report: accuracy per task against Q, accuracy against cost. One colour per family, in all of them.

Drawn with matplotlib's Figure directly: no pyplot, no window, no state between two reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tcjax.evaluate.statistics import Estimate
from tcjax.study.points import Point, chance, families, points, reference, tasks
from tcjax.study.rows import Row

INK, FAINT, GRID = "#22262b", "#7b828c", "#e7e9ec"
REFERENCE = "#4a4f57"
# Okabe & Ito 2008, told apart by colour-blind readers; the yellow is left out, it is too pale for a line.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d", "#7b3294", "#666666")
DPI = 160


def colours(rows: list[Row]) -> dict[str, str]:
    """{compressor: colour}; a family that only serves as the reference is grey."""
    grouped = families(points(rows))
    only_whole = [family for family, its in grouped.items() if all(point.is_reference for point in its)]
    others = sorted(family for family in grouped if family not in only_whole)
    return {family: PALETTE[i % len(PALETTE)] for i, family in enumerate(others)} | dict.fromkeys(only_whole, REFERENCE)


def crowded(rows: list[Row]) -> bool:
    """Whether there are more compressors than colours to tell them apart."""
    return sum(colour != REFERENCE for colour in colours(rows).values()) > len(PALETTE)


def panels(rows: list[Row]) -> dict[str, Callable[[Point], Estimate | None]]:
    """{task: its accuracy at a point}, the mean of all first if there are several."""
    names = tasks(rows)
    measures = {task: lambda point, task=task: point.accuracy.get(task) for task in names}
    return ({"mean of tasks": lambda point: point.mean_accuracy} if len(names) > 1 else {}) | measures


def accuracy(rows: list[Row], path: Path) -> Path:
    """One small panel per task and one for their mean: accuracy against visual tokens, with intervals and chance."""
    made, colour = points(rows), colours(rows)
    whole, asked = reference(made), panels(rows)
    columns = min(len(asked), 4 if len(asked) in (4, 7, 8) or len(asked) > 9 else 3)
    lines = math.ceil(len(asked) / columns)
    figure = Figure(figsize=(2.7 * columns + 0.4, 2.4 * lines + 0.75), dpi=DPI, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    grouped = families(made)
    squeezed = {family: [p for p in grouped[family] if not p.is_reference] for family in colour}
    squeezed = {family: its for family, its in squeezed.items() if its}
    # Families stand side by side, so that intervals at the same Q do not cover each other.
    shifts = {family: 2 ** (0.1 * (i - (len(squeezed) - 1) / 2)) for i, family in enumerate(squeezed)}
    for i, (axes, (name, measure)) in enumerate(zip(grid, asked.items(), strict=False)):
        estimates = {family: [(p, e) for p in its if (e := measure(p))] for family, its in squeezed.items()}
        questions = max((e.n for p in made if (e := measure(p))), default=0)
        axes.set_title(name, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.set_title(f"n = {questions:,}", loc="right", fontsize=8, color=FAINT)
        if (guess := chance(rows, name)) is not None:
            axes.axhline(guess, color=FAINT, linestyle=":", linewidth=1.2, zorder=1)
        if whole and (estimate := measure(whole)):
            axes.axhspan(estimate.low, estimate.high, color=REFERENCE, alpha=0.12, linewidth=0, zorder=0)
            axes.axhline(estimate.mean, color=REFERENCE, linewidth=1.2, zorder=1)
        for family, its in estimates.items():
            at = [point.visual_tokens * shifts[family] for point, _ in its]
            _with_intervals(axes, at, [estimate for _, estimate in its], colour[family])
        style(axes)
        _token_axis(axes, [point.visual_tokens for point in made])
        is_lowest = i + columns >= len(asked)
        axes.tick_params(labelbottom=is_lowest)
        if is_lowest:
            axes.set_xlabel("visual tokens (Q)", fontsize=9, color=INK)
        if i % columns == 0:
            axes.set_ylabel("exact match", fontsize=9, color=INK)
    for axes in grid[len(asked) :]:
        axes.set_visible(False)
    handles = [_handle(colour[family], family) for family in squeezed]
    if whole:
        label = f"{whole.compressor}, all {whole.visual_tokens} tokens"
        handles.append(Line2D([], [], color=REFERENCE, linewidth=1.2, label=label))
    if any(chance(rows, task) is not None for task in asked):
        handles.append(Line2D([], [], color=FAINT, linestyle=":", linewidth=1.2, label="chance"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(handles), 2 + columns), frameon=False, fontsize=9
    )
    return save(figure, path)


def cost(rows: list[Row], path: Path) -> Path | None:
    """Mean accuracy against prefill FLOPs and against KV bytes; None if no row knows its cost."""
    made, colour, many = points(rows), colours(rows), crowded(rows)
    scales = {
        "prefill_flops": ("prefill FLOPs per question (2 × MACs, tower included)", _flops),
        "kv_bytes": ("KV cache per sequence", _bytes),
    }
    known = {key: [point for point in made if point.cost(key)] for key in scales}
    if not all(known.values()):
        return None
    figure = Figure(figsize=(9.7, 4.1), dpi=DPI, layout="constrained")
    for axes, (key, (label, form)) in zip(figure.subplots(1, 2, sharey=True), scales.items(), strict=True):
        axes.set_xscale("log")
        for family, its_points in families(known[key]).items():
            at = [point.cost(key) or 0 for point in its_points]
            _with_intervals(axes, at, [point.mean_accuracy for point in its_points], FAINT if many else colour[family])
        style(axes)
        values = [point.cost(key) or 0 for point in known[key]]
        margin = (max(values) / min(values)) ** 0.09 * 1.02
        low, high = min(values) / margin, max(values) * margin
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high, binary=key == "kv_bytes")))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form(value)))
        axes.set_xlabel(label, fontsize=9, color=INK)
        if many:
            _name_cheapest(axes, known[key], key)
        else:
            _name_points(axes, known[key], key, colour)
    figure.axes[0].set_ylabel("mean accuracy, 95 % interval", fontsize=9.5, color=INK)
    if not many:
        handles = [_handle(c, family) for family, c in colour.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 5), frameon=False, fontsize=9)
    return save(figure, path)


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c8ce")
    axes.tick_params(colors=INK, labelsize=8.5, length=3, color="#c4c8ce")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    return path


def _handle(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker="o", markersize=5, linewidth=1.8, label=label)


def _with_intervals(axes: Axes, at: Sequence[float], estimates: list[Estimate], colour: str) -> None:
    means = [e.mean for e in estimates]
    below = [e.mean - e.low for e in estimates]
    above = [e.high - e.mean for e in estimates]
    axes.errorbar(
        at, means, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1.3, capsize=2.5, alpha=0.75, zorder=2
    )
    axes.plot(at, means, color=colour, marker="o", markersize=4.5, linewidth=1.8, zorder=3)


def _token_axis(axes: Axes, tokens: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(min(tokens) / 1.45, max(tokens) * 1.45)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(tokens))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _name_points(axes: Axes, made: list[Point], key: str, colour: dict[str, str]) -> None:
    """The number of tokens beside each point: upper left of the best at this Q, lower right of the others.

    Lines rise to the right, so neither place lies on a point's own line; a white rim keeps other lines off.
    """
    best = {Q: max(p.mean_accuracy.mean for p in made if p.visual_tokens == Q) for Q in {p.visual_tokens for p in made}}
    for point in made:
        is_best = point.mean_accuracy.mean == best[point.visual_tokens]
        axes.annotate(
            f"{point.visual_tokens}",
            (point.cost(key) or 0, point.mean_accuracy.mean),
            xytext=(-6, 5) if is_best else (6, -5),
            textcoords="offset points",
            ha="right" if is_best else "left",
            va="bottom" if is_best else "top",
            fontsize=8.5,
            color=colour[point.compressor],
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    axes.margins(y=0.14)


def _name_cheapest(axes: Axes, made: list[Point], key: str) -> None:
    """Of many points, those that nothing as cheap or cheaper beats; names that would meet move down."""
    front: list[tuple[float, float, str]] = []
    for point in sorted(made, key=lambda point: (point.cost(key) or 0, -point.mean_accuracy.mean)):
        if not front or point.mean_accuracy.mean > front[-1][1]:
            front.append((point.cost(key) or 0, point.mean_accuracy.mean, f"{point.compressor}, {point.visual_tokens}"))
    low, high = axes.get_xlim()
    free = math.inf
    for at, height, name in reversed(front):
        axes.plot(at, height, color=INK, marker="o", markersize=4.5, zorder=4)
        free = min(height, free - 0.045)
        is_left = math.log(at / low) < 0.4 * math.log(high / low)
        axes.annotate(
            name,
            (at, free),
            xytext=(7 if is_left else -7, 0),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="center",
            fontsize=8.5,
            color=INK,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    axes.margins(y=0.14)


def _ticks(low: float, high: float, *, binary: bool) -> list[float]:
    """Round positions: powers of 2, else 1-2-5 steps of a decade, else its whole numbers; no closer than a label."""
    if binary:
        inside = [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for multiples in ((1, 2, 5), range(1, 10), range(10, 100, 5)):
            inside = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
            if len(inside) >= 3:
                break
    kept: list[float] = []
    for tick in inside:
        if not kept or math.log(tick / kept[-1]) >= 0.18 * math.log(high / low):
            kept.append(tick)
    return kept


def _flops(value: float) -> str:
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {name}FLOP"
    return f"{value:g} FLOP"


def _bytes(value: float) -> str:
    for size, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:g} {name}"
    return f"{value:g} B"
