"""What the compiler said is kept: a file of facts per question, below a folder such as runs/plans.

A question is the step and the machine: the config without what no step sees (names, data, weights), topology, slices, depth,
versions of jax and of the compiler, flags in the environment, and the source that the step is made of. Whoever asks the
same while another process compiles waits for that one's answer; other questions do not wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import tcjax
from tcjax.config import Run
from tcjax.plan.topology import Topology, compiler
from tcjax.plan.worker import Facts, Refused, ask, classes
from tcjax.record import file_hash, to_dict, write_json

FOLDER = "runs/plans"
_UNSEEN = ("steps", "seed", "weights", "save_every", "keep", "log_every", "wandb")  # of TrainConfig, by the compiler
_SHAPES = ("batch", "text_length", "images", "instruction_length", "batching", "independent_turns")  # of DataConfig
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_APART = ("cli", "export", "study", "pipeline", "interop", "answer", "lmms", "dry_run")  # source that is not in a step


def fingerprint(run: Run, topology: Topology, depth: str) -> str:
    """16 hex digits of the question."""
    config = to_dict(run)
    question = {
        "model": config["model"],
        "train": {name: value for name, value in config["train"].items() if name not in _UNSEEN},
        "data": {name: config["data"][name] for name in _SHAPES},
        "mesh": config["mesh"],
        "on": [topology.name, topology.slices, depth],
        "made_by": ["jax " + metadata.version("jax"), compiler(topology.chip)],
        "flags": {name: os.environ.get(name, "") for name in _FLAGS},
        "source": _source(config),
    }
    text = json.dumps(question, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer(
    run: Run, topology: Topology, depth: str, *, folder: Path, say: Callable[[str], None]
) -> tuple[Facts | Refused, bool]:
    """The compiler's answer, and whether it was kept from before. Errors are not kept."""
    path = folder / f"{fingerprint(run, topology, depth)}.json"
    if not path.is_file():
        with _alone(path.with_suffix(".lock"), say):
            if not path.is_file():
                found = ask(run, topology, depth)
                write_json(path, {type(found).__name__.lower(): vars(found)})
                return found, False
    said = json.loads(path.read_text())
    return (Refused(**said["refused"]) if "refused" in said else Facts(**said["facts"])), True


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Of the processes that hold this file's lock at a time there is one; a killed one holds it no longer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"process {file.read().strip() or 'of another user'} compiles the same step; waiting for its answer")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _source(config: Any) -> str:
    """A hash of the files that a step is made of: tcjax's, and those of the user's own config classes."""
    root = Path(tcjax.__file__).parent
    files = [path for path in sorted(root.rglob("*.py")) if not path.relative_to(root).parts[0].startswith(_APART)]
    for name in sorted({path.partition(":")[0] for path in classes(config)}):
        where = getattr(sys.modules.get(name), "__file__", None)
        if where and not name.startswith("tcjax."):
            files.append(Path(where))
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()
