"""Python's share of a training step: what `tcjax train` spends per step beyond the device's own time.

    python -m benchmarks.overhead

The trainer's own loop (`tcjax.train.loop.train`) runs on batches that lie ready in memory, so what is between two of its
requests for a batch is one whole turn: placing the batch, dispatching the jitted step on split state, judging the step
before, counting and logging. The device's time is that of the same step inside one compiled loop, where Python is not asked.
`overhead` is the difference of the medians; the aim is 10 ms. Overhead grows with the number of arrays a step takes and
gives, not with their sizes: the smallest model here has as many as the 7B one, since layers are stacked. All devices of the
process take part, each with one row.

`dispatch` is the part of the call of the step alone until it returns (on a CPU a tiny step runs within it), `place` that of
placing the batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks.compressors import ROOT, markdown, show
from benchmarks.shapes import random_batch, random_model, shape
from benchmarks.sides import Ours
from tcjax.batch import Batch
from tcjax.compressors import resampler
from tcjax.config import DataConfig, MeshConfig, Run, Source, TrainConfig
from tcjax.record import write_json
from tcjax.sharding import make_mesh, on, place_batch
from tcjax.train.log import environment
from tcjax.train.loop import train
from tcjax.vlm import VlmConfig

VISUAL, TEXT = 4, 4
AIM = 10.0
MESH = MeshConfig(data=-1)  # all devices of this process


def smallest() -> VlmConfig:
    """As many arrays as the 7B model's, of which a device makes short work."""
    config = shape("7b", VISUAL)
    tower, llm = config.one_tower, config.llm
    compressor = resampler.Config(num_queries=VISUAL, depth=1, heads=1, head_width=8, ff_mult=1)
    small: dict[str, int] = {"width": 8, "feed_forward": 8}
    return VlmConfig(
        tower=replace(tower, pixels=replace(tower.pixels, size_YX=(28, 28)), layers=2, heads=1, **small),
        compressor=compressor,
        llm=replace(llm, vocab=16, layers=1, heads=1, kv_heads=1, head_width=8, **small),
    )


class Ready:
    """An endless iterator over one batch; `asked` notes when each was wanted."""

    def __init__(self, batch: Batch):
        self.batch, self.asked = batch, []

    def __next__(self) -> Batch:
        self.asked.append(time.perf_counter())
        return self.batch

    def get_state(self) -> dict:
        return {"asked": len(self.asked)}

    def set_state(self, state: dict) -> None: ...

    def counts(self) -> dict[str, int]:
        return {}

    def report(self) -> str:
        return ""


def loop_seconds(run: Run, model: Any, batch: Batch) -> list[float]:
    """Of every turn of the trainer's loop, without the first ten: those compile, and fill the caches."""
    batches = Ready(batch)
    with tempfile.TemporaryDirectory() as folder:
        train(run, model, batches, root=ROOT, out=Path(folder) / "run", identity={"model": "tiny"}, quiet=True)
    return np.diff(batches.asked)[10:].tolist()


def device_seconds(ours: Ours, batch: Batch, steps: int) -> float:
    """Of a step inside one program of many."""
    ours.begin(batch)

    def many(state: Any, frozen: Any, batch: Batch) -> Any:
        with on(ours.mesh):
            return jax.lax.fori_loop(0, steps, lambda number, state: ours.step(state, frozen, batch, number)[0], state)

    jitted = jax.jit(many)
    jax.block_until_ready(jitted(ours.state, ours.frozen, ours.batch))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(jitted(ours.state, ours.frozen, ours.batch))
        taken.append((time.perf_counter() - start) / steps)
    ours.end()
    return median(taken)


def parts(ours: Ours, batch: Batch, steps: int) -> dict[str, float]:
    """Median seconds of placing a batch, and of calling the step until it returns, each with nothing else under way."""
    ours.begin(batch)
    taken: dict[str, list[float]] = {"place": [], "dispatch": []}
    for _ in range(steps + 10):
        start = time.perf_counter()
        place_batch(batch, ours.mesh)
        placed = time.perf_counter()
        ours.run()
        taken["place"].append(placed - start)
        taken["dispatch"].append(time.perf_counter() - placed)
        ours.wait()
    ours.end()
    return {name: median(seconds[10:]) for name, seconds in taken.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmarks/overhead.json")
    arguments = parser.parse_args(argv)
    config, mesh = smallest(), make_mesh(MESH)
    rows = jax.device_count()
    batch = random_batch(config, rows, TEXT, TEXT)
    run = Run(
        name="overhead",
        model=config,
        data=DataConfig(sources=(Source(path="none"),), tokenizer="none", batch=rows),
        train=TrainConfig(steps=arguments.steps + 11, save_every=0),
        mesh=MESH,
    )
    make = partial(random_model, config, "float32", mesh)
    turns = loop_seconds(run, make(), batch)
    ours = Ours(make(), run.train, mesh)
    leaves = len(jax.tree.leaves((ours.first, ours.frozen)))
    device = device_seconds(ours, batch, arguments.steps)
    found = {"turn": median(turns), "device": device} | parts(ours, batch, arguments.steps)
    row = {name: round(1e3 * seconds, 3) for name, seconds in found.items()}
    row |= {"overhead": round(row["turn"] - row["device"], 3), "arrays": leaves, "steps": arguments.steps}
    print(json.dumps(row), flush=True)
    facts = environment(ROOT)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"environment": facts, "rows": {"smallest": row}})
    names = ("turn", "device", "overhead", "place", "dispatch")
    lines = [[*names, "arrays"], [*(f"{row[name]:.2f}" for name in names), str(row["arrays"])]]
    title = (
        f"Milliseconds of a step of the trainer's loop, aim {AIM:.0f}; {facts['hardware']}, commit {facts['commit']}"
    )
    show(lines, title)
    arguments.out.with_suffix(".md").write_text(markdown(lines, title))
    print(arguments.out)


if __name__ == "__main__":
    main()
