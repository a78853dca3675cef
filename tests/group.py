"""Run by tests/test_processes.py: `python -m tests.group PROJECT PORT COUNT NUMBER ACCIDENT` trains as one of COUNT processes.

ACCIDENT: "term RANK STEP" or "kill RANK STEP": that process gets the signal at its STEP-th batch, or soon after it. Batches
take a while, so that what follows falls into the training. A run that will be killed tries to resume
with another frozen model first.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tcjax import job, processes
from tcjax.compressors import resampler
from tcjax.config import DataConfig, MeshConfig, Run, Source, TrainConfig
from tcjax.train import goodput
from tcjax.train.checkpoint import CheckpointMismatch
from tests.tiny import LLM, TOWER, VLM
from tests.tiny_boards import PIXELS

STEPS, EVERY = 18, 3
SIGNALS = {"term": signal.SIGTERM, "kill": signal.SIGKILL}


def a_run(devices: int, *, layers: int = 2) -> Run:
    """Global batches of 8 on a mesh with fsdp 2; a checkpoint every third step."""
    tower = dataclasses.replace(TOWER, pixels=PIXELS, patch=16)
    compressor = resampler.Config(num_queries=4, depth=1, heads=2, head_width=8)
    llm = dataclasses.replace(LLM, vocab=64, layers=layers)
    return Run(
        name="group/run",
        model=dataclasses.replace(VLM, tower=tower, compressor=compressor, llm=llm),
        data=DataConfig(sources=(Source(path="data/digit_boards"),), tokenizer="tokenizer.json", batch=8, threads=0),
        train=TrainConfig(steps=STEPS, peak_lr=1e-2, log_every=1, save_every=EVERY, keep=3),
        mesh=MeshConfig(data=devices // 2, fsdp=2),
    )


class Accident:
    """An Input that has one."""

    def __init__(self, batches: Any, name: str, step: int, mine: bool, folder: Path):
        self._batches, self._name, self._step, self._mine, self._folder = batches, name, step, mine, folder
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __next__(self) -> Any:
        self._count += 1
        done = self._batches.get_state()["next_index"]
        # A kill comes two steps behind a checkpoint, so that some are lost.
        timely = self._count >= self._step and (self._name == "term" or done % EVERY == EVERY - 1)
        if self._mine and timely:
            self._mine = False
            (self._folder / self._name).write_text(json.dumps({"at": time.time(), "done": done}))
            os.kill(os.getpid(), SIGNALS[self._name])
        if self._count > 1:
            time.sleep(0.25)
        return next(self._batches)


def main(project: str, port: str, count: str, number: str, accident: str) -> None:
    began = time.time()
    processes.join(f"localhost:{port}", int(count), int(number))

    import jax

    root, words = Path(project), accident.split()
    if words[:1] == ["kill"]:
        try:
            job.train_run(a_run(jax.device_count(), layers=1), root=root, out=root / "out", quiet=True)
        except CheckpointMismatch as error:
            print(f"REFUSED {error}", flush=True)
    (name, rank, step), real = words, job.make_input

    def make_input(*args: Any, **kwargs: Any) -> Any:
        return Accident(real(*args, **kwargs), name, int(step), rank == number, root)

    job.make_input = make_input
    goodput._EVERY = 0.0  # a line for every step
    job.train_run(a_run(jax.device_count()), root=root, out=root / "out", began=began)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        print(repr(error), file=sys.stderr)
        raise SystemExit(processes.end(1, error)) from error
