"""What a run says: metrics.jsonl always, a progress bar on a terminal, plain lines elsewhere, W&B when wanted and there."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import tcjax
from tcjax.config import Run
from tcjax.record import to_dict, write_json

WANDB_MODES = ("off", "online", "offline")


class MetricsFile:
    """metrics.jsonl, one line per logged step. On resume, lines after the resumed step are dropped: they never happened."""

    def __init__(self, path: Path, resumed_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        beside = path.with_name(path.name + ".writing")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        beside.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; one cut short by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class Record:
    """What a run's folder says about it: run.json, env.json, metrics.jsonl, and W&B; of several processes one writes."""

    def __init__(self, run: Run, resumed_step: int, *, root: Path, out: Path, write: bool):
        self._file, self._log, self._finish = None, lambda line: None, lambda: None
        if write:
            config = to_dict(run)
            write_json(out / "run.json", config)
            write_json(out / "env.json", environment(root))
            self._log, self._finish = start_wandb(run.train.wandb, run.name, config, out)
            self._file = MetricsFile(out / "metrics.jsonl", resumed_step)

    def write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(line)
            self._log(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._finish()


class Reporter:
    """Shows progress: a bar with rate and remaining time on a terminal, a line every `every` steps elsewhere."""

    def __init__(self, name: str, steps: int, *, every: int, quiet: bool = False, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._name, self._steps, self._every, self._quiet = name, steps, every, quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, facts="")

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: int, line: dict[str, Any] | None) -> None:
        facts = "" if line is None else f"loss {line['loss']:.3f}  {line['images_per_second']:.0f} images/s"
        if line is not None and not self._quiet and not self._console.is_terminal:
            self._console.print(f"{self._name}  step {step}/{self._steps}  {facts}", highlight=False, soft_wrap=True)
        self._bar.update(self._task, completed=step)
        if facts:
            self._bar.update(self._task, facts=facts)

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, soft_wrap=True)


def start_wandb(mode: str, name: str, config: dict, folder: Path) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """`log, finish`. ValueError for an unknown mode, or if it is wanted and not installed."""
    if mode not in WANDB_MODES:
        raise ValueError(f"wandb={mode!r} is not one of {list(WANDB_MODES)}.")
    if mode == "off":
        return (lambda line: None), (lambda: None)
    try:
        import wandb  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ValueError(f"wandb={mode!r} needs the package: pip install 'tcjax[wandb]', or set wandb=off.") from error
    run = wandb.init(project="tcjax", name=name, config=config, dir=str(folder), mode=mode)  # pyright: ignore
    return (lambda line: run.log(line, step=line["step"])), run.finish


def environment(root: Path) -> dict[str, Any]:
    """env.json: commit, versions, devices, date, command."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "tcjax": tcjax.__version__,
        "commit": commit(root),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "devices": [str(device) for device in jax.devices()],
        "hardware": hardware(),
        "processes": jax.process_count(),
    }


def commit(root: Path) -> str:
    """The project's git commit, "+changes" appended if its tracked files differ from it; "" outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return ""
    return "" if head.returncode else head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def hardware() -> str:
    """What a figure was measured on, e.g. "8 x NVIDIA H100" or "2 CPU cores, Intel(R) Xeon(R)"."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{os.cpu_count()} CPU cores, {names[0] if names else platform.processor() or platform.machine()}"
