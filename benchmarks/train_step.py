"""LLaVA-1.5's first stage, one training step: the trainer's own against the same step in PyTorch.

    python -m benchmarks.train_step                             on a GPU: 7B, bfloat16, the largest batch that fits
    python -m benchmarks.train_step --size 13b --remat full     gradient checkpointing on both sides
    python -m benchmarks.train_step --size tiny --batch 4       on a CPU: proves that it works

A step sees B images and rows of 64 visual and 128 text tokens, of which the last 96 are supervised: CLIP-L/336 (frozen) ->
resampler (learns) -> decoder (frozen) -> loss -> gradient of the resampler alone -> clip -> AdamW. Weights are random.
Ours is what `tcjax train` jits: `make_step` and `jit_step`. Theirs is what people write: transformers' CLIPVisionModel and
LlamaForCausalLM with SDPA and frozen parameters, the resampler's exported twin under autocast, the fused AdamW; eager, and
under torch.compile as a whole. Before anything is timed, both train a tiny model from the same weights, in float32 on the
CPU, and must agree on loss and gradient norm of every step to 1e-5.

Each side runs in a process of its own, so each has the whole memory. Without --batch each finds the largest batch that fits,
to an eighth, and both are timed at the smaller of the two, and ours at its own, too. Times are of three steps in a row, as a
training runs them, the median of at least three such turns. `useful` is the share of the device's peak (--peak, TFLOP/s;
known for some) that goes into FLOPs the mathematics needs: a frozen decoder's weights count 4 N, whatever is recomputed
does not count. `ratio` is our samples per second over the better torch's at the same batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from benchmarks.compressors import ROOT, markdown, show
from benchmarks.shapes import SIZES, one_device, peak_of, random_batch, random_model, shape
from benchmarks.sides import Ours, Theirs, attempt, fits, largest, matched, timed
from tcjax.config import TrainConfig
from tcjax.evaluate.cost import training_flops
from tcjax.nn.layers import REMATS
from tcjax.record import write_json
from tcjax.train.log import environment
from tcjax.vlm import VlmConfig

VISUAL, TEXT, SUPERVISED = 64, 128, 96
EQUAL = 1e-5


def training(arguments: argparse.Namespace) -> TrainConfig:
    """The trainer's defaults, at a constant rate: what the step computes is the same at every step."""
    return TrainConfig(
        steps=1_000_000,
        warmup=0.0,
        peak_lr=1e-3,
        remat=arguments.remat,
        compute=arguments.dtype,
        frozen=arguments.dtype,
    )


def compare(arguments: argparse.Namespace, steps: int = 3) -> dict[str, float]:
    """The largest relative difference of loss and gradient norm over some steps of the tiny model in float32.

    Raises:
        ValueError: they differ by more than EQUAL, or nothing was learned that they could agree on.
    """
    told = argparse.Namespace(remat=arguments.remat, dtype="float32")
    config, mesh = shape("tiny", VISUAL), one_device()
    batch = random_batch(config, 2, TEXT, SUPERVISED)
    model = config.build(nnx.Rngs(0))
    theirs = Theirs(config, training(told), torch.device("cpu"), compiled=False)
    matched(model, theirs, config)
    ours = Ours(model, training(told), mesh)
    found = {}
    for name, side in {"ours": ours, "theirs": theirs}.items():
        side.begin(batch)
        found[name] = []
        for _ in range(steps):
            side.run()
            found[name].append(side.wait())
        side.end()
    a, b = (np.array(found[name]) for name in ("ours", "theirs"))
    apart = (np.abs(a - b) / np.abs(b)).max(0)
    if apart.max() > EQUAL or not np.all(np.diff(b[:, 0]) < 0):
        raise ValueError(f"the two sides compute different steps; (loss, gradient norm) by step: {found}.")
    return {"loss": float(apart[0]), "grad_norm": float(apart[1]), "steps": steps}


def peer(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one side's process finds out: its device, the largest batch if one was looked for, and times by batch."""
    config = shape(arguments.size, VISUAL)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not arguments.batch and "cpu" in (jax.default_backend() if name == "jax" else where.type):
        raise ValueError("on a CPU the largest batch is the machine's end; name one with --batch.")
    if name == "jax":
        mesh = one_device()
        device = jax.local_devices()[0].device_kind
        sides: dict[str, Any] = {"jax": Ours(random_model(config, arguments.dtype, mesh), training(arguments), mesh)}
    else:
        device = torch.cuda.get_device_name() if where.type == "cuda" else "cpu"
        theirs = Theirs(config, training(arguments), where, compiled=arguments.compile)
        sides = {"torch.compile": theirs} if arguments.compile else {}
        sides["torch"] = theirs if not arguments.compile else theirs.uncompiled()

    def batch_of(batch: int) -> Any:
        return random_batch(config, batch, TEXT, SUPERVISED)

    answer: dict[str, Any] = {"device": device, "largest": None, "rows": []}
    batches = [arguments.batch]
    if not arguments.batch:
        first = next(iter(sides.values()))
        answer["largest"] = largest(lambda batch: fits(first, batch_of(batch)), arguments.start)
        batches = sorted({answer["largest"], min(answer["largest"], arguments.also or answer["largest"])})
    for batch in batches:
        for kind, side in sides.items():
            torch.compiler.reset()  # the search has told it that batches differ
            taken = attempt(side, batch_of(batch), partial(timed, seconds=arguments.seconds))
            answer["rows"].append({"name": kind, "batch": batch, "seconds": None} | (taken or {}))
    if name == "jax":
        answer["environment"] = environment(ROOT)
    return answer


def asked(name: str, argv: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The same of a process of its own; "compare" of one that sees the CPU alone."""
    if arguments.one_process:
        return answered(name, arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = {"JAX_PLATFORMS": "cpu"}
        if name == "jax":  # the whole memory; and a batch that was tried is not compiled again to be timed
            place = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", "JAX_COMPILATION_CACHE_DIR": folder}
        told = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.train_step", *argv, "--peer", name, "--answer", str(told)]
        ended = subprocess.run(command, env=os.environ | place, cwd=ROOT)
        if ended.returncode:
            raise SystemExit(f"{' '.join(command[1:])} ended with {ended.returncode}.")
        return json.loads(told.read_text())


def answered(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return compare(arguments) if name == "compare" else peer(name, arguments)


def judged(rows: list[dict[str, Any]], config: VlmConfig, peak: float) -> list[dict[str, Any]]:
    """The rows with samples per second, useful share, and at each batch that both ran, our ratio."""
    flops = training_flops(config, TEXT, supervised=SUPERVISED)
    judged = []
    for row in rows:
        rate = row["batch"] / row["seconds"] if row["seconds"] else None
        useful = rate * flops / (1e12 * peak) if rate and peak else None
        judged.append(row | {"samples_per_second": rate, "flops_per_sample": flops, "useful": useful})
    for row in judged:
        if row["name"] != "jax":
            continue
        others = [
            other["samples_per_second"]
            for other in judged
            if other["name"] != "jax" and other["batch"] == row["batch"] and other["seconds"]
        ]
        row["ratio"] = row["samples_per_second"] / max(others) if others and row["samples_per_second"] else None
    return judged


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A head, then one line for each side and batch."""

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [["side", "batch", "ms / step", "samples / s", "useful", "ratio"]]
    for row in rows:
        milliseconds = "out of memory" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f}"
        rates = [cell(row["samples_per_second"], 2), cell(row["useful"], 3), cell(row.get("ratio"), 2)]
        lines.append([row["name"], str(row["batch"]), milliseconds, *rates])
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--batch", type=int, default=0, help="0: the largest that fits")
    parser.add_argument("--start", type=int, default=32, help="batch that the search begins with")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="bfloat16 on a GPU")
    parser.add_argument(
        "--remat", choices=REMATS, default="none", help="theirs checkpoints gradients unless it is none"
    )
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device; 0: as known")
    parser.add_argument("--seconds", type=float, default=30.0, help="per measurement; three turns are always taken")
    parser.add_argument("--only", default="jax,torch", help="of jax and torch, separated by a comma")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--one-process", action="store_true", help="both sides in this process: small sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmarks/train_step.json")
    parser.add_argument("--also", type=int, default=0, help=argparse.SUPPRESS)  # the other side's largest batch
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    unknown = set(arguments.only.split(",")) - {"jax", "torch"}
    if unknown:
        parser.error(f"--only {arguments.only}: {sorted(unknown)} are none of jax and torch")
    return arguments


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.peer:
        write_json(arguments.answer, answered(arguments.peer, arguments))
        return
    only, answers = arguments.only.split(","), {}
    difference = asked("compare", argv, arguments)
    print("difference", json.dumps(difference), flush=True)
    if "torch" in only:
        answers["torch"] = asked("torch", argv, arguments)
    if "jax" in only:
        also = (answers.get("torch") or {}).get("largest") or 0
        arguments.also = also
        answers["jax"] = asked("jax", [*argv, "--also", str(also)], arguments)
    rows = [row for answer in answers.values() for row in answer["rows"]]
    if (answers.get("jax", {}).get("largest") or 0) < (answers.get("torch", {}).get("largest") or 0):
        batch = answers["jax"]["largest"]
        arguments.batch = batch
        rows += asked("torch", [*argv, "--batch", str(batch)], arguments)["rows"]
    devices = {name: answer["device"] for name, answer in answers.items()}
    if len(set(devices.values())) > 1:
        raise SystemExit(f"the two sides ran on different devices, {devices}: nothing was compared.")
    device = next(iter(devices.values()))
    peak = arguments.peak or peak_of(device)
    facts = answers.get("jax", {}).get("environment") or {"hardware": device}
    facts |= {"command": " ".join(["python -m benchmarks.train_step", *argv]), "torch": torch.__version__}
    facts |= {key: getattr(arguments, key) for key in ("size", "dtype", "remat")} | {"peak": peak}
    facts |= {"difference": difference, "largest": {name: answer["largest"] for name, answer in answers.items()}}
    rows = judged(rows, shape(arguments.size, VISUAL), peak)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"environment": facts, "rows": rows})
    title = (
        f"A training step: {arguments.size}, {VISUAL} visual and {TEXT} text tokens, {arguments.dtype}, remat "
        f"{arguments.remat}, {facts['hardware']}, commit {facts.get('commit', '')}"
    )
    show(table_of(rows), title)
    arguments.out.with_suffix(".md").write_text(markdown(table_of(rows), title))
    print(arguments.out)


if __name__ == "__main__":
    main()
