"""Tables on a terminal: the scores of one run, and the export targets that hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tcjax.config import Run
from tcjax.export.run import TARGETS


def score_table(name: str, step: int, scores: Mapping[str, Any]) -> None:
    """Accuracy per task with its interval, chance and controls; then what an answer costs."""
    table = Table(title=f"{name}, step {step}")
    controls = list(scores["controls"])
    for column in ("task", "exact", "95% interval", "per token", "chance", *controls, "n"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, score in scores["accuracy"].items():
        table.add_row(
            task,
            f"{score['mean']:.3f}",
            f"{score['low']:.3f} – {score['high']:.3f}",
            f"{scores['token_accuracy'][task]:.3f}",
            f"{scores['chance'][task]:.3f}",
            *(f"{scores['controls'][control][task]['mean']:.3f}" for control in controls),
            str(score["n"]),
        )
    console = Console()
    console.print(table)
    console.print(
        f"mean without caption {scores['mean_accuracy']:.3f}; {scores['visual_tokens']} visual tokens "
        f"({scores['ratio']:g}x fewer), prefill {scores['prefill_flops'] / 1e9:.3f} GFLOP and "
        f"{scores['prefill_seconds'] * 1e3:.2f} ms per image, KV cache {scores['kv_bytes'] / 2**10:.1f} KiB",
        highlight=False,
    )


def benchmark_table(name: str, scores: Mapping[str, Any]) -> None:
    """The headline with its interval, the controls beside it, and every metric but those of many small groups."""
    console = Console()
    title = f"{name}, step {scores['step']}: {scores['benchmark']} {scores['split']}, mode {scores['mode']}"
    if "headline" not in scores:
        console.print(
            f"{title}: the answers are not published; the submission is in {scores['folder']}", highlight=False
        )
        return
    table = Table(title=title)
    for column in ("metric", "score", "95% interval", *scores["controls"]):
        table.add_column(column, justify="left" if column == "metric" else "right")
    head = scores["headline"]
    beside = (f"{control['mean']:.2f}" for control in scores["controls"].values())
    table.add_row(head["name"], f"{head['mean']:.2f}", f"{head['low']:.2f} – {head['high']:.2f}", *beside)
    for metric, value in scores["metrics"].items():
        if metric != head["name"] and not metric.startswith(("question type/", "class/")):
            table.add_row(metric, f"{value:.2f}", "", *("" for _ in scores["controls"]))
    console.print(table)
    console.print(
        f"{scores['questions']} questions; each answer and the submission in {scores['folder']}", highlight=False
    )


def comparison_table(a: str, b: str, found: Sequence[Any]) -> None:
    """One line per benchmark: both headlines, and a minus b with its paired interval."""
    table = Table(title=f"{a} - {b}")
    for column in ("benchmark", "metric", "a", "b", "a - b", "95% interval", "n"):
        table.add_column(column, justify="left" if column in ("benchmark", "metric") else "right")
    for line in found:
        interval = f"{line.gain.low:+.2f} – {line.gain.high:+.2f}"
        means = (f"{line.a.mean:.2f}", f"{line.b.mean:.2f}", f"{line.gain.mean:+.2f}")
        table.add_row(line.title, line.headline, *means, interval, str(line.gain.n))
    Console().print(table)


def target_table(run: Run, *, as_json: bool) -> None:
    """One line per export target: what it writes, and whether it holds this run's compressor or why it does not."""
    lines = [
        {"target": name, "writes": target.about, "why_not": target.why_not(run)} for name, target in TARGETS.items()
    ]
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    table = Table(title=f"{run.name}: tcjax export ... --to")
    for column in ("target", "writes", "holds it"):
        table.add_column(column)
    for line in lines:
        table.add_row(line["target"], line["writes"], f"no: {line['why_not']}" if line["why_not"] else "yes")
    Console().print(table)
