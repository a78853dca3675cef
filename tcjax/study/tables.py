"""Tables on a terminal: the scores of one run, and the export targets that hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
