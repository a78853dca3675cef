"""What would training cost, and on what? Stage 1 of LLaVA-1.5 with 64 visual and 128 text tokens, planned on machines.

    python -m experiments.plans.study [--only NAME]      writes plans.jsonl and plans.md beside this file

Every row is one `tcjax plan` command; its answer is kept in runs/plans, so that a run that was stopped goes on where it was.
About 20 s a row the first time, on two CPU cores and below 2 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from configs import llava, llms
from tcjax.config import Run
from tcjax.train.log import environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEVEN, THIRTEEN = "configs/llava.py:pretrain_7b", "configs/llava.py:pretrain_13b"
SEVENTY = "experiments/plans/study.py:pretrain_70b"


class Row(NamedTuple):
    """group: of the table. per_device: rows of the batch on each; 0 is the recipe's batch of 256. slices: of TPUs."""

    group: str
    config: str
    topology: str
    per_device: int = 0
    devices: int = 0
    slices: int = 1
    frozen: str = "bfloat16"

    @property
    def name(self) -> str:
        model = self.config.rpartition("_")[2]
        where = self.topology + (f" x {self.slices}" if self.slices > 1 else "")
        return f"{model} {self.frozen} {where}" + (f" {self.per_device} each" if self.per_device else "")

    @property
    def command(self) -> list[str]:
        words = ["tcjax", "plan", self.config, "--topology", self.topology, "--data.text-length", "128"]
        if self.slices > 1:
            words += ["--slices", str(self.slices), "--mesh.data", str(self.slices)]
        if self.per_device:
            words += ["--batch", str(self.per_device * self.devices)]
        return words + ([] if self.frozen == "bfloat16" else ["--train.frozen", self.frozen])


def pretrain_70b() -> Run:
    """LLaVA's stage 1 with Llama-3-70B, a resampler of 64 tokens; nobody published it."""
    run = llava.pretrain_7b()
    return run.replace(name="llava/pretrain-70b", model=replace(run.model, llm=llms.llama_3_70b()))


ROWS = [
    *(Row("Llama-7B, the recipe's batch of 256", SEVEN, where) for where in ("v5e:4x4", "v5e:16x16", "v6e:16x16")),
    *(Row("Llama-7B, the recipe's batch of 256", SEVEN, where) for where in ("v5p:4x4x4", "h200:8")),
    Row("Llama-7B, the recipe's batch of 256", SEVEN, "v5e:8x8", slices=2),
    Row("Llama-7B on two slices", SEVEN, "v5e:16x16", per_device=1, devices=512, slices=2),
    *(
        Row("Weak scaling, Llama-7B at 16 rows a chip", SEVEN, where, 16, devices, slices)
        for where, devices, slices in (
            ("v5e:4x4", 16, 1),
            ("v5e:8x8", 64, 1),
            ("v5e:16x16", 256, 1),
            ("v5e:16x16", 1024, 4),
        )
    ),
    *(Row("Llama-13B", THIRTEEN, where) for where in ("v5e:4x4", "v5p:4x4x4", "h200:8")),
    *(Row("Llama-3-70B", SEVENTY, where) for where in ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "h200:8")),
    *(
        Row("Frozen weights in int8", config, where, frozen="int8")
        for config in (SEVEN, THIRTEEN, SEVENTY)
        for where in ("v5e:4x4", "v5p:4x4x4")
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this; nothing is written")
    only = parser.parse_args().only
    found, made = [], environment(ROOT)
    for row in ROWS:
        if only in row.name:
            found.append(planned(row))
            print(f"{row.name}: {found[-1]['verdict']}", flush=True)
    if not only:
        (HERE / "plans.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
        (HERE / "plans.md").write_text(table(found, made))


def planned(row: Row) -> dict:
    """The plan of a row, made in a process of its own."""
    command = [sys.executable, "-m", "tcjax.cli", *row.command[1:], "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(row.command)} ended with code {done.returncode}.")
    plan = json.loads(done.stdout)
    left_out = ("heaviest", "cached", "search")
    facts = {name: value for name, value in plan.items() if name not in left_out}
    return {"row": row.name, "group": row.group, "command": " ".join(row.command), **facts}


def table(rows: list[dict], made: dict) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu", "jax-cuda13-plugin"))
    lines = [
        "# Plans",
        "",
        "Per device; step and hours are predictions. Made by `python -m experiments.plans.study` at commit",
        f"{made['commit']}, {made['date'][:10]}, {made['hardware']}, {versions}. `plans.jsonl` has each row's own command.",
        "",
    ]
    heads = (
        "| | devices | batch | memory GiB | gathered GB | ICI GB | DCN MB | TFLOPs | predicted step | bound | hours |"
    )
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [f"## {group}", "", heads, "|---|" + "---:|" * 8 + "---|---:|"]
        lines += [_line(row) for row in rows if row["group"] == group] + [""]
    return "\n".join(lines)


def _line(row: dict) -> str:
    memory = f"{row['peak'] / 2**30:.2f} of {row['available'] / 2**30:.2f}"
    if not row["fits"]:
        return f"| {row['row']} | {row['devices']:,} | {row['batch']:,} | {memory} | | | | | does not fit | | |"
    cells = [
        row["row"],
        f"{row['devices']:,}",
        f"{row['batch']:,}",
        memory,
        f"{sum(row['gathered'].values()) / 1e9:.1f}",
        f"{row['ici_bytes'] / 1e9:.1f}",
        f"{row['dcn_bytes'] / 1e6:.1f}",
        f"{row['executed_flops'] / row['devices'] / 1e12:.1f}",
        f"{row['step_seconds']:.3g} s",
        row["bound"],
        f"{row['hours']:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
