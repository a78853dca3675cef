"""The catalogue of compressors as a table: what each gives on a grid, what it needs and costs, where it can be taken."""

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
from tcjax.config import DataConfig, Pixels, Run, TrainConfig
from tcjax.evaluate.cost import compressor_flops
from tcjax.export.run import TARGETS
from tcjax.llms.decoder import LlmConfig
from tcjax.towers.vit import VitConfig
from tcjax.vlm import VlmConfig


def catalogue_table(
    catalogue: Mapping[str, Callable[[int], Any]], grid_HW: tuple[int, int], vision: int, llm: int, *, as_json: bool
) -> None:
    """One line per compressor: which Q it gives on this grid and how, what it needs, its parameters and FLOPs, its source."""
    widths = Widths(grid_HW=grid_HW, vision_C=vision, llm_D=llm, text_D=llm)
    lines = [catalogue_line(name, make, widths) for name, make in catalogue.items()]
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    table = Table(title=f"{grid_HW[0]}x{grid_HW[1]} tokens of width {vision} -> LLM width {llm}")
    by_all = [name for name in TARGETS if all(name in line["exports"] for line in lines if line["at"])]
    for column in ("name", "Q", "elastic", "needs", "parameters", "GFLOP at Q", "exports", "source"):
        right, whole = column in ("parameters", "GFLOP at Q"), column in ("name", "source")
        table.add_column(column, justify="right" if right else "left", no_wrap=whole)
    for line in lines:
        table.add_row(
            line["name"],
            line["queries"],
            line["elastic"],
            ", ".join(line["needs"]),
            f"{line['parameters'] / 1e6:.1f} M" if line["at"] else "-",
            f"{line['flops'] / 1e9:.2f} at {line['at']}" if line["at"] else "-",
            ", ".join(name for name in line["exports"] if name not in by_all),
            line["source"],
        )
    console = Console(width=max(Console().width, 140))  # a narrow terminal wraps its lines; the cells stay whole
    console.print(table)
    console.print(f"exports: besides {', '.join(by_all)}, which hold every one of them", highlight=False)


def catalogue_line(name: str, make: Callable[[int], Any], widths: Widths) -> dict[str, Any]:
    """queries: what it can give, in words. at: the number its parameters and FLOPs are of, 64 where possible."""
    possible = []
    for num in range(1, widths.num_tokens + 1):
        try:
            make(num).outputs(make(num).asked(widths))
        except ValueError:
            continue
        possible.append(num)
    usual = 64 if 64 in possible else (possible[-1] if possible else 0)
    config = make(usual or 1)
    seen = config.asked(widths)
    line = {
        "name": name,
        "queries": _in_words(possible) if possible else "none on this grid",
        "possible": possible,
        "at": usual,
        "elastic": config.elastic,
        "needs": list(config.needs),
        "source": _source(type(config).__module__),
    }
    try:
        leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: config.build(seen, nnx.Rngs(0))))) if usual else []
    except ValueError as error:
        return line | {"queries": f"none: {error}", "possible": [], "at": 0, "parameters": 0, "flops": 0, "exports": []}
    return line | {
        "parameters": sum(leaf.size for leaf in leaves),
        "flops": compressor_flops(config, seen) if usual else 0,
        "exports": _targets(config, seen) if usual else [],
    }


def _targets(config: CompressorConfig, widths: Widths) -> list[str]:
    """The export targets that hold this compressor between a published kind of tower and a Llama of these widths."""
    (H, W), C = widths.grid_HW, widths.vision_C
    clip = VitConfig(
        pixels=Pixels(size_YX=(14 * H, 14 * W)),
        patch=14,
        width=C,
        layers=24,
        heads=max(C // 64, 1) if C % max(C // 64, 1) == 0 else 1,
        feed_forward=4 * C,
        activation="quick_gelu",
        norm_eps=1e-5,
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        post_norm=True,
        feature_layer=-2,
    )
    siglip = replace(
        clip,
        activation="gelu_pytorch_tanh",
        norm_eps=1e-6,
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        feature_layer=-1,
    )
    internvit = replace(clip, activation="gelu", norm_eps=1e-6, patch_bias=True, pre_norm=False, feature_layer=-1)
    D = widths.llm_D
    llm = LlmConfig(
        vocab=32000,
        width=D,
        layers=32,
        heads=max(D // 128, 1),
        kv_heads=max(D // 128, 1),
        head_width=D // max(D // 128, 1),
        feed_forward=4 * D,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie=False,
    )
    runs = []
    wants_class = config.of_tower().get("keep_class", False)
    for tower in (clip, siglip, internvit):
        if wants_class and not tower.class_token:
            continue
        model = VlmConfig(tower=tower, compressor=config, llm=llm)
        runs.append(Run(name="any", model=model, data=DataConfig(sources=(), tokenizer=""), train=TrainConfig(steps=1)))
    return [name for name, target in TARGETS.items() if any(not target.why_not(run) for run in runs)]


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
