"""One compilation in a process of its own: what it needs of memory ends with it, and it never sees an accelerator.

    question   JSON on stdin: run (tcjax.record), modules its classes come from, sys.path, topology, slices, depth
    answer     JSON in a folder of the asking process, which holds the compiler's dump, too, and is removed after it:
               facts (`Facts`), or refused {needs, has}, or error: one line that a user can act on

The compiler's own chatter goes to this process's stderr, which is shown only if it dies without an answer.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tcjax
from tcjax.plan.topology import ENVIRONMENT, Topology
from tcjax.record import IS, from_dict, to_dict, write_json

# Not `-m`: the folder of tcjax comes last, so that nothing beside it hides a module of Python's own.
_START = "import sys; sys.path.append(sys.argv[1]); from tcjax.plan.worker import main; main()"


@dataclass(frozen=True)
class Facts:
    """What the compiler and the counters said of one step, per device unless told otherwise.

    mesh: {axis: size}. memory: as tcjax.plan.compile.Memory, None at depth "program". executed_flops: of all devices
    together. hbm_bytes: an estimate. ici_bytes, dcn_bytes: sent. gathered: {type: bytes} that all-gathers hand over.
    heaviest: the collectives that send most, [{kind, dtype, shape, times, ...}]. open_loops: loops counted at their
    longest. compile_seconds: of XLA.
    """

    mesh: dict[str, int]
    memory: dict[str, int] | None
    executed_flops: int
    hbm_bytes: int
    ici_bytes: int
    dcn_bytes: int
    gathered: dict[str, int]
    heaviest: list[dict[str, Any]]
    open_loops: list[str]
    compile_seconds: float


@dataclass(frozen=True)
class Refused:
    """It does not fit: bytes it needs of what a device has, by the compiler's count of what it saw."""

    needs: int
    has: int


def ask(run: Any, topology: Topology, depth: str, *, limit: float = 1800.0) -> Facts | Refused:
    """Compile a run's step in a new process. limit: seconds until that is given up.

    Raises:
        ValueError: what a user can act on, as the compiling process said it, or how that process died.
    """
    config = to_dict(run)
    question = {
        "run": config,
        "modules": sorted({path.partition(":")[0] for path in classes(config)}),
        "path": [entry for entry in sys.path if entry],
        "topology": topology.name,
        "slices": topology.slices,
        "depth": depth,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    with tempfile.TemporaryDirectory(prefix="tcjax-plan-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        environment = kept | ENVIRONMENT | {"TPU_LOG_DIR": folder}
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is cached is not dumped
        command = [sys.executable, "-P", "-c", _START, str(Path(tcjax.__file__).parents[1]), folder]
        with log.open("w") as chatter:
            try:
                done = subprocess.run(
                    command,
                    input=json.dumps(question),
                    stdout=chatter,
                    stderr=chatter,
                    env=environment,
                    text=True,
                    timeout=limit,
                )
            except subprocess.TimeoutExpired:
                raise ValueError(f"the compiler had no answer for {topology.name} within {limit:.0f} s.") from None
        if not answer.is_file():
            last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-8:])
            raise ValueError(f"the compiling process ended with code {done.returncode} and no answer: {last}")
        said = json.loads(answer.read_text())
    if "error" in said:
        raise ValueError(said["error"])
    return Refused(**said["refused"]) if "refused" in said else Facts(**said["facts"])


def classes(config: Any) -> Iterator[str]:
    """ "module:Class" of every dataclass in a config as `to_dict` writes it."""
    if isinstance(config, dict):
        if IS in config:
            yield config[IS]
        for value in config.values():
            yield from classes(value)
    elif isinstance(config, list):
        for value in config:
            yield from classes(value)


def main() -> None:
    question = json.load(sys.stdin)
    sys.path[:] = question["path"]
    folder = Path(sys.argv[2])
    from tcjax.plan.compile import DoesNotFit

    try:
        said: dict[str, Any] = {"facts": vars(_facts(question, folder / "dump"))}
    except DoesNotFit as refused:
        said = {"refused": {"needs": refused.needs, "has": refused.has}}
    except ValueError as error:
        said = {"error": str(error)}
    write_json(folder / "answer.json", said)
    sys.stderr.flush()
    os._exit(0)  # the compiler may still be generating code that nobody waits for


def _facts(question: dict[str, Any], dump: Path) -> Facts:
    from tcjax.plan.compile import compile_step, mesh_of, step_of
    from tcjax.plan.topology import island_of, topology
    from tcjax.plan.traffic import Traffic, traffic
    from tcjax.plan.work import executed_flops, hbm_bytes
    from tcjax.shapes import held

    for module in question["modules"]:
        importlib.import_module(module)
    run = from_dict(question["run"])
    where = topology(question["topology"], question["slices"])
    step = step_of(run, mesh_of(run, where))
    compiled = compile_step(step, where, dump, question["depth"])
    sent = traffic(compiled.hlo, island_of(step.mesh.devices.flat)) if compiled.hlo else Traffic(0, 0, ())
    gathered: dict[str, int] = {}
    for one in sent.collectives:
        if one.kind == "all-gather":
            gathered[one.dtype] = gathered.get(one.dtype, 0) + one.bytes * one.times
    learned = held(step.arguments[0].trainable, step.mesh)
    return Facts(
        mesh=dict(step.mesh.shape),
        memory=compiled.memory._asdict() if compiled.memory else None,
        executed_flops=executed_flops(step.function, *step.arguments),
        hbm_bytes=hbm_bytes(step.function, *step.share, gathered=sum(gathered.values()), state=4 * learned),
        ici_bytes=sent.ici_bytes,
        dcn_bytes=sent.dcn_bytes,
        gathered=gathered,
        heaviest=[vars(one) for one in sent.heaviest()],
        open_loops=[f"{loop.where}: {loop.turns} turns at most" for loop in sent.unknown_loops],
        compile_seconds=round(compiled.seconds, 1),
    )
