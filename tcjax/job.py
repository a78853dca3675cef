"""Training a Run, from its config to the model: joins pipeline, features and loop, which do not know each other.

    load_run:     a run's folder -> its resolved config
    train_run:    config -> model with its weights, features, batches -> tcjax.train.loop -> trained model
    trained:      a run's folder -> the model as it was trained
    at:           that model with fewer visual tokens, where one training serves several numbers

Content (datasets, configs) arrives as paths below the project's root.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from tcjax.assemble import assemble, build
from tcjax.compressors.base import CompressorConfig
from tcjax.config import Run, Source
from tcjax.evaluate.cost import training_flops
from tcjax.interop import names
from tcjax.interop.mismatch import mismatch
from tcjax.nn.quantised import kind_of
from tcjax.pipeline import images
from tcjax.pipeline.chat import open_chat
from tcjax.pipeline.images import CorruptImage
from tcjax.pipeline.input import make_input
from tcjax.pipeline.sample import BadSample, Record
from tcjax.pipeline.source import open_source
from tcjax.processes import is_first
from tcjax.record import IS, fingerprint, from_dict, to_dict
from tcjax.sharding import make_mesh, place
from tcjax.train.checkpoint import Checkpoints
from tcjax.train.feature_store import Features
from tcjax.train.features import Seen, cached_features
from tcjax.train.loop import Outcome, train
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import init, split
from tcjax.vlm import Vlm, VlmConfig

FEATURES = "runs/features"


def load_run(out: Path) -> Run:
    """The resolved config of a run's folder; ValueError if it is none, or names an unknown field."""
    path = out / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{out} is not a run's folder: it has no run.json. `tcjax train CONFIG` makes one below runs/."
        )
    run = from_dict(json.loads(path.read_text()), str(path))
    if not isinstance(run, Run):
        raise ValueError(f"{path} does not hold a Run but a {type(run).__name__}.")
    return run


def train_run(run: Run, *, root: Path, out: Path, quiet: bool = False, began: float | None = None) -> Outcome:
    """Train a run in its folder `out`, resuming if it holds checkpoints. With 0 steps the model is the one assembled.

    Of several processes all call it, each with the same arguments; `root` and `out` lie on a disk they share.

    Args:
        began: Unix time of the start, if it was long before now (tcjax.train.goodput).
    """
    config: Any = run.model
    began, quiet = began or time.time(), quiet or not is_first()
    config.num_queries  # noqa: B018  an impossible Q is said first
    if isinstance(config, VlmConfig):  # before gigabytes are read
        open_chat(root / run.data.tokenizer, run.data.template).check_vocab(config.llm.vocab)
    opened = [open_source(root, source) for source in run.data.sources]
    model, identity = _assembled(run, root)
    features = None
    if run.train.feature_cache:
        features = tuple(
            tower_features(model, identity, run, source, root=root, quiet=quiet) for source in run.data.sources
        )
    with _bar(quiet) as bar:
        tasks: dict[Source, Any] = {}

        def measuring(source: Source, done: int, num: int) -> None:
            if source not in tasks:
                tasks[source] = bar.add_task(f"lengths of {source.path} {source.split}", total=num)
            bar.update(tasks[source], completed=done)

        batches = make_input(
            run.data,
            config.tower.pixels,
            config.num_queries,
            root=root,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            features=features,
            patch=config.labelled_patch,
            instructed=isinstance(config, VlmConfig) and config.reads_text,
            measuring=measuring,
            opened=opened,
        )
    return train(
        run,
        model,
        batches,
        root=root,
        out=out,
        identity=identify(run, identity),
        flops=_flops(run),
        quiet=quiet,
        began=began,
    )


def tower_features(
    model: Any, identity: dict[str, Any], run: Run, source: Source, *, root: Path, quiet: bool = False
) -> Features:
    """The frozen tower's tokens of every image of `source`, from the shared cache."""
    prepared, pixels = open_source(root, source), model.tower.cfg.pixels

    def see(record: Record, number: int) -> Seen | None:
        try:
            return images.of(record, pixels, number)
        except CorruptImage:
            return None

    def read(index: int) -> list[Seen | None]:
        try:
            record = prepared[index]
        except BadSample:
            return []  # never a sample, so nothing asks for its images
        return [see(record, number) for number in range(len(record.images))]

    def wait() -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"features of {source.path} {source.split}")

    facts = {
        "tower": to_dict(model.tower.cfg) | {"weights": identity["tower.weights"]},
        "dataset": fingerprint(source, root),
        "records": len(prepared),
    }
    kind = kind_of(nnx.state(model.tower))
    if kind != "float32":
        facts["frozen"] = kind
    with _shown(f"features of {source.path} {source.split}", len(prepared), quiet) as show:
        return cached_features(
            model.tower,
            pixels,
            read,
            len(prepared),
            folder=root / FEATURES,
            facts=facts,
            dtype=run.train.feature_cache,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=run.data.threads,
            wait=wait,
            show=show,
        )


def _assembled(run: Run, root: Path, frozen: str | None = None) -> tuple[Any, dict[str, Any]]:
    return assemble(
        run.model,
        root=root,
        seed=run.train.seed,
        start=run.train.weights,
        mesh=make_mesh(run.mesh),
        trainable=run.train.trainable,
        lora=run.train.lora,
        frozen=frozen or run.train.frozen,
    )


def _bar(quiet: bool) -> Progress:
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=quiet, transient=True, console=Console(stderr=True))


@contextmanager
def _shown(what: str, total: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """`show(done, total)`: a bar on a terminal, a line every tenth of the way elsewhere."""
    if quiet or Console(stderr=True).is_terminal:
        with _bar(quiet) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, num: bar.update(task, completed=done, total=num)
        return
    told, begun = [0], time.perf_counter()

    def show(done: int, num: int) -> None:
        if 10 * done // num > told[0]:
            told[0] = 10 * done // num
            print(f"{what}  {done:,} of {num:,}  {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)

    yield show


def trained(run: Run, *, root: Path, out: Path, frozen: str | None = None) -> tuple[nnx.Module, dict[str, Any], int]:
    """The model with the newest checkpoint of `out` in it, its identity, and the checkpoint's step.

    A run of 0 steps has no checkpoint and is the model as it was assembled.

    Args:
        frozen: how the frozen weights shall lie in memory; None is as in training. What is exported is read as "float32".
    """
    model, identity = _assembled(run, root, frozen)
    if run.train.steps == 0:
        return model, identity, 0
    mesh = make_mesh(run.mesh)
    graphdef, trainable, frozen = split(model, run.train.trainable)
    state = place(init(place(trainable, mesh), make_optimiser(run.train)), mesh)
    checkpoints = Checkpoints(out / "checkpoints", keep=run.train.keep)
    restored = checkpoints.restore(state, identify(run, identity))
    checkpoints.close()
    if restored is None:
        raise ValueError(f"{out} holds no checkpoint yet; run `tcjax train` on its config first.")
    return nnx.merge(graphdef, restored.state.trainable, place(frozen, mesh)), identity, restored.step


def at(run: Run, model: nnx.Module, num_queries: int) -> tuple[Run, Vlm]:
    """The run and its model at another number of visual tokens, with the same weights.

    Raises:
        ValueError: the compressor is not elastic, cannot give this number, or would need other weights for it.
    """
    config = run.model
    assert isinstance(config, VlmConfig) and isinstance(config.compressor, CompressorConfig)
    smaller = replace(config, compressor=config.compressor.at(num_queries))
    abstract = nnx.eval_shape(lambda: build(smaller, lora=run.train.lora))
    different = mismatch(names.shapes(model), names.shapes(abstract), "leaves")
    if different is not None:
        raise ValueError(
            f"{run.name} at {num_queries} tokens needs other weights than it was trained with: {different}"
        )
    graphdef, _ = nnx.split(abstract)
    return run.replace(model=smaller), nnx.merge(graphdef, nnx.state(model))


# What may change when a run goes on: how long, how often it speaks and saves.
_FREE = ("remat", "steps", "save_every", "keep", "log_every", "wandb")


def identify(run: Run, model_identity: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint must agree with: the model, the weights it stands on, the data, and how it is trained."""
    train = {f"train.{k}": v for k, v in to_dict(run.train).items() if k not in (*_FREE, IS)}
    data = {f"data.{k}": v for k, v in to_dict(run.data).items() if k != IS}
    return model_identity | data | train


def _flops(run: Run) -> Callable[[int, int], float]:
    """Useful FLOPs of one sample's step by its positions and supervised tokens; 0 where no formula is known."""
    config = run.model
    if not isinstance(config, VlmConfig):
        return lambda positions, supervised: 0.0
    how, Q = run.train, config.num_queries
    return lambda positions, supervised: training_flops(
        config,
        positions - Q,
        how.trainable,
        lora=how.lora,
        supervised=supervised,
        cached_features=bool(how.feature_cache),
    )
