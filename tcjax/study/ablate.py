"""Runs a study: a list of Runs, one after the other; each trained, scored, exported and written down as one row.

A study is a folder with a `study.py` that has `runs(queries, compressors, seeds, steps) -> list[Run]`. A run whose fingerprint
has a row is skipped; one that was interrupted goes on from its newest checkpoint. Rows go to runs/<study>/rows.jsonl, and
the runs' folders lie beside it. A folder left by another config of the same name is kept under its old fingerprint.
"""

from __future__ import annotations

import inspect
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from rich.console import Console

from tcjax import content
from tcjax.answer import evaluate_run, looks
from tcjax.config import Run
from tcjax.export.families import has_twin
from tcjax.export.run import export_artifact
from tcjax.job import at, train_run, trained
from tcjax.pipeline.source import open_source
from tcjax.processes import is_first
from tcjax.record import fingerprint, write_json
from tcjax.sharding import own
from tcjax.study import rows
from tcjax.study.converged import converged
from tcjax.train.log import environment, read_metrics
from tcjax.vlm import Vlm, VlmConfig

FINGERPRINT = "fingerprint.json"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the command line asks of a study; None leaves the study's own default."""

    queries: tuple[int, ...] | None = None
    compressors: tuple[str, ...] | None = None
    seeds: int | None = None
    steps: int | None = None


def study_runs(folder: Path, choice: Choice) -> tuple[list[Run], Path]:
    """The study's runs and the project's root. ValueError for no study.py, no runs(), an empty or ambiguous list."""
    path = folder / "study.py"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a study: it has no study.py with a function runs(queries, compressors, seeds, steps)."
        )
    module, root = content.load(path)
    make = getattr(module, "runs", None)
    asked = {name: value for name, value in vars(choice).items() if value is not None}
    if make is None or not set(asked) <= set(inspect.signature(make).parameters):
        raise ValueError(
            f"{path} must have runs(queries=..., compressors=..., seeds=..., steps=...) -> list[Run], each with a default."
        )
    runs = make(**asked)
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not runs or twice:
        raise ValueError(f"{path}: " + (f"these names stand twice: {twice}." if twice else "runs() is empty."))
    return runs, root


def ablate(folder: Path, choice: Choice, *, only: int = 0, out: Path | None = None, quiet: bool = False) -> Path:
    """Run what is not finished yet; return the study's output folder. only: one run's number, from 1; 0 is all of them."""
    runs, root = study_runs(folder, choice)
    if not 0 <= only <= len(runs):
        names = [f"{number} {run.name}" for number, run in enumerate(runs, 1)]
        more = "" if len(runs) <= 12 else f", ... ({folder} --list names them all)"
        raise ValueError(f"--run {only}: {folder} has {len(runs)} runs: {', '.join(names[:12])}{more}.")
    for run in runs:
        run.model.num_queries  # noqa: B018  # pyright: ignore  an impossible Q is said before hours of other runs
    study = out or root / "runs" / folder.resolve().name
    console = Console(stderr=True, quiet=quiet or not is_first())
    done, begun = {row["fingerprint"]: row for row in rows.read(study)[0]}, time.perf_counter()
    for number, run in enumerate(runs, 1):
        if only not in (0, number):
            continue
        mark, place = fingerprint(run, root), study / run.name.rpartition("/")[2]
        head = f"[{number}/{len(runs)}] {run.name}"
        if _agreed(mark in done):
            console.print(f"{head}: finished before, skipped ({mark})", highlight=False)
            continue
        console.print(f"{head}  {time.perf_counter() - begun:.0f} s so far", highlight=False)
        if is_first():
            _claim(place, mark)
        _together(f"{run.name} begins")
        for row in run_rows(run, mark, list(done.values()), root=root, place=place, quiet=quiet):
            done[row["fingerprint"]] = row
            if is_first():
                rows.append(study, row)
        means = {task: round(score["mean"], 3) for task, score in done[mark]["accuracy"].items()}
        text = f"{head}: mean {done[mark]['mean_accuracy']:.3f}  {means}"
        console.print(text, highlight=False, soft_wrap=True)
        jax.clear_caches()  # the next run's programs have other shapes; memory would only grow
    return study


def run_rows(
    run: Run, mark: str, before: list[rows.Row], *, root: Path, place: Path, quiet: bool = False
) -> list[rows.Row]:
    """Train, score and export one run: a row for every other Q that the same weights are scored at, then its own.

    Of several processes all call it; the first one writes.

    before: the study's rows so far, for the artifact's card.
    """
    config = run.model
    if not isinstance(config, VlmConfig):
        raise ValueError(f"{run.name} trains a {type(config).__name__}; a study compares compressors of a VLM.")
    assert run.evaluate is not None
    open_source(root, run.evaluate.source)  # what is missing is said before the training
    outcome = train_run(run, root=root, out=place, quiet=quiet)
    model, identity, step = trained(run, root=root, out=place)
    assert isinstance(model, Vlm)
    metrics, environ = read_metrics(place / "metrics.jsonl"), environment(root)
    facts = {
        "compressor": run.label or type(config.compressor).__module__.rpartition(".")[2],
        "seed": run.train.seed,
        "train_seconds": sum(line["seconds"] for line in metrics),
        "steps": step,
        "compiles": outcome.compiles,
        "converged": converged(metrics),
        **{name: environ[name] for name in ("commit", "hardware", "date", "command")},
    }
    found: list[rows.Row] = []
    for number in run.evaluate.queries:
        other, its_model = at(run, model, number)
        scores = evaluate_run(other, its_model, identity, root=root, out=place / f"at-{number}", quiet=quiet)
        found.append(facts | _row(f"{place.name}@{number}", f"{mark}@{number}", scores, None))
    scores = evaluate_run(run, model, identity, root=root, out=place, quiet=quiet)
    looks(model, run, root=root, out=place)
    artifact = f"{place.name}/artifact" if has_twin(config.compressor) else None
    found.append(facts | _row(place.name, mark, scores, artifact))
    if artifact:
        graphdef, weights = nnx.split(model.compressor)
        model.compressor = nnx.merge(graphdef, own(weights))
    if artifact and is_first():
        export_artifact(run, model, identity, out=place / "artifact", root=root, rows=[*before, *found])
    return found


def _together(what: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _agreed(answer: bool) -> bool:
    """The first process's answer: a disk that several share may show them different rows."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def _row(name: str, mark: str, scores: dict, artifact: str | None) -> rows.Row:
    asked = {"run": name, "num_queries": scores["visual_tokens"], "fingerprint": mark, "artifact": artifact}
    return asked | scores


def _claim(place: Path, mark: str) -> None:
    """Make room for this run: what another config left under the name is moved aside, never overwritten."""
    note = place / FINGERPRINT
    if place.exists() and (not note.exists() or json.loads(note.read_text())["fingerprint"] != mark):
        old = json.loads(note.read_text())["fingerprint"] if note.exists() else "unknown"
        place.rename(place.with_name(f"{place.name}.{old}"))
    write_json(note, {"fingerprint": mark})
