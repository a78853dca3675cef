"""Tables on a terminal: the scores of one run, and the catalogue of compressors for a grid."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from tcjax.compressors.base import Widths
from tcjax.evaluate.cost import compressor_flops
from tcjax.export.families import has_twin

TRIED = tuple(range(1, 26)) + (32, 36, 49, 64, 81, 100, 121, 144, 169, 196, 225, 256, 324, 361, 400, 529, 576, 729)


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


def catalogue_table(
    catalogue: Mapping[str, Callable[[int], Any]], grid_HW: tuple[int, int], vision: int, llm: int, *, as_json: bool
) -> None:
    """One line per compressor: which Q it gives on this grid, its parameters and FLOPs at the largest, its source."""
    widths = Widths(grid_HW=grid_HW, vision_C=vision, llm_D=llm, text_D=llm)
    lines = [_line(name, make, widths) for name, make in catalogue.items()]
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    table = Table(title=f"{grid_HW[0]}x{grid_HW[1]} tokens of width {vision} -> LLM width {llm}")
    for column in ("name", "Q", "parameters", "GFLOP at Q", "exports to", "source"):
        table.add_column(column, justify="right" if column in ("parameters", "GFLOP at Q") else "left")
    for line in lines:
        cost = f"{line['flops'] / 1e9:.2f} at {line['flops_at']}" if line["flops_at"] else "-"
        table.add_row(
            line["name"], line["queries"], f"{line['parameters']:,}", cost, ", ".join(line["exports"]), line["source"]
        )
    Console().print(table)


def _line(name: str, make: Callable[[int], Any], widths: Widths) -> dict[str, Any]:
    possible = []
    for num in sorted({*TRIED, widths.num_tokens}):
        try:
            make(num).outputs(widths)
        except ValueError:
            continue
        possible.append(num)
    everything = set(range(1, 26)) <= set(possible)
    usual = 64 if 64 in possible else (possible[-1] if possible else 0)
    config = make(usual or 1)
    widths = replace(widths, levels=len(config.of_tower().get("levels", ())))
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0))))) if usual else []
    return {
        "name": name,
        "queries": "any" if everything else ", ".join(map(str, possible)) or "none on this grid",
        "possible": possible,
        "parameters": sum(leaf.size for leaf in leaves),
        "flops": compressor_flops(config, widths) if usual else 0,
        "flops_at": usual,
        "exports": ["artifact"] if has_twin(config) else [],
        "source": _source(type(config).__module__),
    }


def _source(module: str) -> str:
    """The first work the compressor's docstring names, as "Alayrac et al. 2022"."""
    text = " ".join((importlib.import_module(module).__doc__ or "").split())
    found = re.search(r"[A-Z]\w+ et al\. [0-9]{4}", text)
    return found.group() if found else ""
