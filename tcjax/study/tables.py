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

from tcjax.compressors.base import CompressorConfig, Widths
from tcjax.config import Run
from tcjax.evaluate.cost import compressor_flops
from tcjax.export.families import has_twin
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


def catalogue_table(
    catalogue: Mapping[str, Callable[[int], Any]], grid_HW: tuple[int, int], vision: int, llm: int, *, as_json: bool
) -> None:
    """One line per compressor: which Q it gives on this grid and how, what it needs, its parameters and FLOPs, its source."""
    widths = Widths(grid_HW=grid_HW, vision_C=vision, llm_D=llm, text_D=llm)
    lines = [_line(name, make, widths) for name, make in catalogue.items()]
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    table = Table(title=f"{grid_HW[0]}x{grid_HW[1]} tokens of width {vision} -> LLM width {llm}")
    for column in ("name", "Q", "elastic", "needs", "parameters", "GFLOP at Q", "exports to", "source"):
        table.add_column(column, justify="right" if column in ("parameters", "GFLOP at Q") else "left")
    for line in lines:
        table.add_row(
            line["name"],
            line["queries"],
            line["elastic"],
            ", ".join(line["needs"]),
            f"{line['parameters'] / 1e6:.1f} M" if line["at"] else "-",
            f"{line['flops'] / 1e9:.2f} at {line['at']}" if line["at"] else "-",
            ", ".join(line["exports"]),
            line["source"],
        )
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


def _line(name: str, make: Callable[[int], Any], widths: Widths) -> dict[str, Any]:
    """queries: what it can give, in words. at: the number its parameters and FLOPs are of, 64 where possible."""
    possible = []
    for num in range(1, widths.num_tokens + 1):
        try:
            make(num).outputs(_seen(make(num), widths))
        except ValueError:
            continue
        possible.append(num)
    usual = 64 if 64 in possible else (possible[-1] if possible else 0)
    config, seen = make(usual or 1), _seen(make(usual or 1), widths)
    line = {
        "name": name,
        "queries": _in_words(possible) if possible else "none on this grid",
        "possible": possible,
        "at": usual,
        "elastic": config.elastic,
        "needs": list(config.needs),
        "exports": ["artifact"] if has_twin(config) else [],
        "source": _source(type(config).__module__),
    }
    if not possible:
        return line | {"parameters": 0, "flops": 0}
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: config.build(seen, nnx.Rngs(0)))))
    return line | {"parameters": sum(leaf.size for leaf in leaves), "flops": compressor_flops(config, seen)}


def _seen(config: CompressorConfig, widths: Widths) -> Widths:
    """The widths with what the compressor asks of the tower."""
    asked = config.of_tower()
    return replace(widths, grid_HW=asked.get("shrunk_HW", widths.grid_HW), levels=len(asked.get("levels", ())))


def _in_words(possible: list[int]) -> str:
    """[1, ..., 576] is "1 - 576", all squares are named as such, the rest is listed."""
    first, last = possible[0], possible[-1]
    if len(possible) > 3 and possible == list(range(first, last + 1)):
        return f"{first} – {last}"
    if len(possible) > 8 and possible == [side**2 for side in range(1, len(possible) + 1)]:
        return f"squares to {last}"
    return ", ".join(map(str, possible))


def _source(module: str) -> str:
    """The first work the compressor's docstring names, as "Alayrac et al. 2022"."""
    text = " ".join((importlib.import_module(module).__doc__ or "").split())
    found = re.search(r"[A-Z]\w+ et al\. [0-9]{4}", text)
    return found.group() if found else ""
