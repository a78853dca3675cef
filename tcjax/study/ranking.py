"""The figure of a study of many compressors: one line each, the best at the top, accuracy per task from left to right.

A catalogue has more compressors than there are colours to tell apart, so names stand beside the points.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from tcjax.study.lints import BASELINE
from tcjax.study.plots import DPI, FAINT, GRID, INK, PALETTE, REFERENCE, panels, save, style
from tcjax.study.points import chance, points, reference
from tcjax.study.rows import Row


def ranking(rows: list[Row], path: Path) -> Path:
    """One panel per task and one for their mean, each with intervals, the reference (a line) and chance (dotted)."""
    made = points(rows)
    whole, asked = reference(made), panels(rows)
    ranked = sorted((point for point in made if not point.is_reference), key=lambda point: point.mean_accuracy.mean)
    figure = Figure(figsize=(1.5 * len(asked) + 2.2, 0.19 * len(ranked) + 1.1), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(asked), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, measure) in zip(grid, asked.items(), strict=True):
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=INK)
        if (guess := chance(rows, name)) is not None:
            axes.axvline(guess, color=FAINT, linestyle=":", linewidth=1.2, zorder=1)
        if whole and (estimate := measure(whole)):
            axes.axvline(estimate.mean, color=REFERENCE, linewidth=1.2, zorder=1)
        for height, point in enumerate(ranked):
            if estimate := measure(point):
                colour = PALETTE[1] if point.compressor == BASELINE else PALETTE[0]
                axes.plot([estimate.low, estimate.high], [height, height], color=colour, linewidth=1.3, alpha=0.6)
                axes.plot(estimate.mean, height, color=colour, marker="o", markersize=4)
        style(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.7, len(ranked) - 0.3)
        axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    grid[0].set_yticks(range(len(ranked)), [f"{point.compressor}, {point.visual_tokens}" for point in ranked])
    note = f"exact match; points: mean and 95 % interval, orange: {BASELINE}; dotted: chance"
    if whole:
        note += f"; line: {whole.compressor}, all {whole.visual_tokens} tokens"
    figure.supxlabel(note, fontsize=9, color=INK)
    return save(figure, path)
