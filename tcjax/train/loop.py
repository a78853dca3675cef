"""The training loop: feeds the jitted step, writes what happened, saves, resumes, and stops when told to.

A run's folder: run.json (resolved config), env.json, metrics.jsonl, goodput.jsonl, checkpoints/. Running the same config
again goes on from the newest checkpoint with the same next batch; on CPU the losses are bit for bit those of an
uninterrupted run. SIGTERM and Ctrl-C save the current step and end with `Stopped`. One step is in flight while the next
batch is fetched.

Of several processes each feeds its share of every batch and saves what lies on its devices; the first one alone writes
the other files and speaks. A signal to one of them stops all at the same step (tcjax/processes.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tcjax.batch import Batch
from tcjax.config import Run
from tcjax.processes import is_first, stop_signals
from tcjax.sharding import check_batch, make_mesh, place, place_batch
from tcjax.train import log
from tcjax.train.checkpoint import Checkpoints
from tcjax.train.goodput import FILE, Goodput, summary, told
from tcjax.train.optimiser import make_optimiser, schedule
from tcjax.train.state import compute_dtype, init, num_parameters, recompute, split
from tcjax.train.step import Metrics, jit_step, make_step


class BatchIterator(Protocol):
    """An endless, resumable iterator of this process's share of every global batch (tcjax.pipeline.make_input)."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict: ...
    def set_state(self, state: dict) -> None: ...
    def counts(self) -> dict[str, int]:
        """What was left out so far, by kind: every logged line says it."""
        ...

    def report(self) -> str:
        """One line about what was left out, "" if nothing was: the last thing a run says."""
        ...


class Stopped(SystemExit):
    """A signal ended the run after a save; the process exits with 128 + signal number, which launchers restart on."""


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient became NaN or infinite; nothing after the last good checkpoint was kept."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """model: with the trained parts merged in. seconds: of this process, compilation included. compiles: of the step."""

    model: nnx.Module
    steps: int
    seconds: float
    compiles: int


def train(
    run: Run,
    model: nnx.Module,
    batches: BatchIterator,
    *,
    root: Path,
    out: Path,
    identity: dict,
    flops: Callable[[int, int], float] = lambda positions, supervised: 0.0,
    quiet: bool = False,
    began: float | None = None,
) -> Outcome:
    """Train `run.train.trainable` of `model` for `run.train.steps` steps, from the newest checkpoint in `out` if there is one.

    Args:
        root: project root, for the commit in env.json.
        out: the run's folder.
        identity: facts a checkpoint must agree with (model config, hashes of frozen weights).
        flops: useful floating-point operations of one sample's step by its positions, padding left out, and its supervised
            tokens, for the logged rate.
        began: Unix time at which all this began, where that was long before now; for goodput.jsonl.

    Raises:
        Stopped: after SIGTERM or SIGINT, the current step saved.
        NonFiniteLoss: with the step and the last good checkpoint.
        CheckpointMismatch: `out` holds another run's checkpoints.
        OSError: a save failed; the previous checkpoint is whole.
    """
    config, started, first_process = run.train, time.perf_counter(), is_first()
    goodput = Goodput(out / FILE if first_process else None, began=began)
    mesh = make_mesh(run.mesh)
    check_batch(run.data.batch, mesh, config.accumulate)
    optimiser, dtype = make_optimiser(config), compute_dtype(config.compute)
    recompute(model, config.remat, packed=run.data.batching == "packed")
    graphdef, trainable, frozen = split(model, config.trainable)
    frozen = place(frozen, mesh)
    state = place(init(place(trainable, mesh), optimiser), mesh)
    step_fn = make_step(
        graphdef, optimiser, accumulate=config.accumulate, dtype=dtype, seed=config.seed, steps=config.steps
    )
    step_fn = jit_step(step_fn, state, mesh)

    checkpoints = Checkpoints(out / "checkpoints", keep=config.keep, saved=goodput.background)
    goodput.spend("init")
    restored = checkpoints.restore(state, identity)
    first = 0
    if restored is not None:
        first, state = restored.step, restored.state
        batches.set_state(restored.iterator)
        goodput.spend("restore")
    record = log.Record(run, first, root=root, out=out, write=first_process)
    rate, window, code = schedule(config), _Window(flops), 1
    reporter = log.Reporter(run.name, config.steps, every=config.log_every, quiet=quiet or not first_process)

    def judge(step: int, metrics: Metrics) -> dict[str, Any]:
        values = {name: float(value) for name, value in metrics._asdict().items()}
        if step == first + 1:
            goodput.first(step)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            safe = checkpoints.latest()
            good = "no checkpoint was saved yet" if safe is None else f"the last good checkpoint is step {safe}"
            raise NonFiniteLoss(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; {good} in {out}. "
                "Lower train.peak_lr, raise train.warmup, or look at the data of this step."
            )
        window.tokens += values.pop("count")
        return values

    try:
        if first < config.steps:
            goodput.start(first)
        with reporter, stop_signals() as told_to:
            learns, rests = num_parameters(trainable), num_parameters(frozen)
            reporter.say(f"{run.name}: {learns:,} parameters learn, {rests:,} are frozen; mesh {dict(mesh.shape)}")
            if first:
                reporter.say(f"{run.name}: resumed at step {first} of {config.steps}")
            pending: tuple[int, Metrics] | None = None
            compiled = 1
            for step in range(first + 1, config.steps + 1):
                with window.waiting():
                    read = next(batches)
                    batch = place_batch(read, mesh)
                window.read(read)
                goodput.spend("data")
                state, metrics = step_fn(state, frozen, batch, np.int32(step))
                fresh = step == first + 1 or step_fn._cache_size() > compiled  # pyright: ignore[reportAttributeAccessIssue]
                goodput.spend("compile" if fresh else "step")
                if fresh and step > first + 1:
                    compiled += 1
                    length = read.valid_BS.shape[1]
                    reporter.say(f"{run.name}: step {step} has rows of {length} positions; compilation {compiled}")
                if pending is not None:
                    judge(*pending)
                pending = (step, metrics)
                stop = told_to()
                logs = step % config.log_every == 0 or step == config.steps
                saves = (config.save_every and step % config.save_every == 0) or step == config.steps or stop
                if logs or saves:
                    values, pending = judge(*pending), None
                    if logs:
                        line = {
                            "step": step,
                            **values,
                            "learning_rate": float(np.asarray(rate(step - 1))),
                            **window.rates(),
                            **_of_all(batches.counts()),
                        }
                        record.write(line)
                        reporter.show(step, line)
                goodput.stepped(step)
                if saves:
                    checkpoints.save(step, state, batches.get_state(), identity)
                    goodput.spend("save")
                if stop:
                    checkpoints.wait()
                    goodput.spend("save")
                    code = 128 + stop
                    reporter.say(
                        f"{run.name}: signal {stop}; step {step} of {config.steps} is saved, run again to resume"
                    )
                    raise Stopped(code)
            if left_out := batches.report():
                reporter.say(f"{run.name}: {left_out}")
        checkpoints.wait()
        goodput.spend("save")
        code = 0
    finally:
        goodput.end(code)
        record.close()
        checkpoints.close()
    if first_process and first < config.steps:
        reporter.say(f"{run.name}: {told(summary(out))}")
    trained = nnx.merge(graphdef, state.trainable, frozen)
    return Outcome(
        model=trained,
        steps=max(first, config.steps),
        seconds=time.perf_counter() - started,
        compiles=step_fn._cache_size(),  # pyright: ignore[reportAttributeAccessIssue]
    )


class _Window:
    """Counts since the last logged line."""

    def __init__(self, flops: Callable[[int, int], float]):
        self._flops = flops
        self._restart()

    def _restart(self) -> None:
        self.started, self.waited, self.tokens = time.perf_counter(), 0.0, 0.0
        self.images, self.samples, self.positions, self.padding = 0, 0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    def read(self, batch: Batch) -> None:
        """Counts this process's share of a global batch: padding is no position, a blank slot no image."""
        self.images += len(batch.valid_BS) if batch.index_B is None else int(np.sum(batch.index_B >= 0))
        self.samples += num_samples(batch)
        positions = int(np.sum(batch.valid_BS))
        self.positions += positions
        self.padding += batch.valid_BS.size - positions

    def rates(self) -> dict[str, float]:
        """images and supervised tokens per second, share of the time spent waiting for the host, of padding, FLOP/s."""
        seconds, processes = max(time.perf_counter() - self.started, 1e-9), jax.process_count()
        samples = max(self.samples, 1)
        flops = self._flops(round(self.positions / samples), round(self.tokens / (processes * samples)))
        line = {
            "images_per_second": processes * self.images / seconds,
            "supervised_tokens_per_second": self.tokens / seconds,
            "host_wait_share": self.waited / seconds,
            "padding_share": self.padding / max(self.padding + self.positions, 1),
            "useful_flops_per_second": processes * self.samples * flops / seconds,
            "seconds": seconds,
        }
        self._restart()
        return line


def num_samples(batch: Batch) -> int:
    """Conversations in a batch: one per row, or, in packed rows (which have no segment 0), as many as segments."""
    if batch.segment_BS is None or np.any(batch.valid_BS & (batch.segment_BS == 0)):
        return len(batch.valid_BS)
    return int(np.sum(np.max(batch.segment_BS, axis=1, where=batch.valid_BS, initial=0)))


def _of_all(counts: dict[str, int]) -> dict[str, int]:
    """What the processes counted, each in its share, added up; each of them must ask."""
    if jax.process_count() == 1:
        return counts
    every = multihost_utils.process_allgather(np.array(list(counts.values()), np.int64))
    return dict(zip(counts, every.sum(0).tolist(), strict=True))
