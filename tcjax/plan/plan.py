"""Will it fit, and what would it cost: a run on a machine by name, compiled and counted, in one record.

known from the compiler     peak memory, arguments, temporaries; whether it fits
counted                     useful FLOPs (tcjax/evaluate/cost.py), executed ones (work.py), bytes sent (traffic.py)
predicted                   seconds of a step and hours of the run (predict.py): a roofline, measured on nothing
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from tcjax.config import MeshConfig, Run
from tcjax.plan.answers import FOLDER, answer
from tcjax.plan.predict import EFFICIENCY, predict
from tcjax.plan.topology import Topology
from tcjax.plan.traffic import Traffic
from tcjax.plan.worker import Facts, Refused
from tcjax.shapes import useful_flops
from tcjax.sharding import MESH_AXES, check_batch, mesh_sizes

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes and memory are per device, FLOPs of the whole step on all devices.

    peak: bytes that have to be in memory at once; of a plan that does not fit what the compiler asked for before it gave
    up. arguments: weights, state and batch. temporaries: activations, gathered weights, workspace. useful_flops: None
    where no formula is known. hbm_bytes: moved, an estimate. gathered: bytes that all-gathers hand over, by type.
    seconds: compute, HBM, ICI and DCN, each as if alone. step_seconds, hours: predictions. open_loops: loops whose
    length is data, counted at their longest. would_fit: of a plan that does not. search: what `--search` tried.
    """

    name: str
    topology: str
    slices: int
    devices: int
    mesh: dict[str, int]
    batch: int
    steps: int
    fits: bool
    verdict: str
    peak: int
    available: int
    arguments: int | None = None
    temporaries: int | None = None
    useful_flops: int | None = None
    executed_flops: int | None = None
    hbm_bytes: int | None = None
    ici_bytes: int | None = None
    dcn_bytes: int | None = None
    gathered: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bound: str = ""
    step_seconds: float | None = None
    hours: float | None = None
    efficiency: float = EFFICIENCY
    open_loops: tuple[str, ...] = ()
    heaviest: tuple[dict[str, Any], ...] = ()
    compile_seconds: float = 0.0
    cached: bool = False
    would_fit: str = ""
    search: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def say_nothing(line: str) -> None:
    pass


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def plan(
    run: Run,
    topology: Topology,
    *,
    root: Path,
    depth: str = "memory",
    say: Callable[[str], None] = say_nothing,
) -> Plan:
    """Compile the run's step for this machine, unless that has been done, and count.

    Args:
        run: its mesh has to multiply to the machine's devices, its batch to divide over them.
        root: of the project; answers are kept in its runs/plans.
        depth: one of tcjax.plan.compile.DEPTHS but "program"; "code" generates code as well, which takes minutes.

    Raises:
        ValueError: mesh, batch or config do not go together, or the compiler for this machine is missing.
    """
    run = laid_out(run, topology)
    found, cached = answer(run, topology, depth, folder=root / FOLDER, say=say)
    return of_facts(run, topology, found, cached=cached)


def laid_out(run: Run, topology: Topology, **changes: int) -> Run:
    """The run with its mesh's sizes spelt out for this machine. ValueError if they or the batch do not divide.

    changes: data, fsdp, tensor or batch instead of the run's own.
    """
    batch = changes.pop("batch", run.data.batch)
    data, fsdp, tensor = mesh_sizes(replace(run.mesh, **changes), topology.num_devices)
    if data % topology.slices:
        raise ValueError(
            f"mesh.data={data} must be a multiple of the {topology.slices} slices, between which only data goes: "
            f"--mesh.data {topology.slices} --mesh.fsdp -1."
        )
    check_batch(batch, AbstractMesh((data, fsdp, tensor), MESH_AXES), run.train.accumulate)
    return run.replace(mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor), data=replace(run.data, batch=batch))


def of_facts(run: Run, topology: Topology, found: Facts | Refused, *, cached: bool) -> Plan:
    """The plan of what the compiler said."""
    about: dict[str, Any] = {
        "name": run.name,
        "topology": topology.name,
        "slices": topology.slices,
        "devices": topology.num_devices,
        "batch": run.data.batch,
        "steps": run.train.steps,
        "useful_flops": useful_flops(run),
        "cached": cached,
    }
    if isinstance(found, Refused):
        verdict = f"does not fit: needs {found.needs / GIB:.2f} GiB of {found.has / GIB:.2f} GiB per device"
        return Plan(**about, mesh=asdict(run.mesh), fits=False, verdict=verdict, peak=found.needs, available=found.has)
    memory = found.memory or {}
    flops = found.executed_flops / topology.num_devices
    seen = predict(flops, found.hbm_bytes, Traffic(found.ici_bytes, found.dcn_bytes, ()), topology.chip)
    share = memory["peak"] / memory["available"]
    return Plan(
        **about,
        mesh=found.mesh,
        fits=True,
        verdict=f"fits: {share:.0%} of the memory; {seen.bound} bound, by prediction",
        peak=memory["peak"],
        available=memory["available"],
        arguments=memory["arguments"],
        temporaries=memory["temporaries"],
        executed_flops=found.executed_flops,
        hbm_bytes=found.hbm_bytes,
        ici_bytes=found.ici_bytes,
        dcn_bytes=found.dcn_bytes,
        gathered=found.gathered,
        seconds={name.removesuffix("_seconds"): value for name, value in seen._asdict().items()},
        bound=seen.bound,
        step_seconds=seen.step_seconds,
        hours=seen.step_seconds * run.train.steps / 3600,
        open_loops=tuple(found.open_loops),
        heaviest=tuple(found.heaviest),
        compile_seconds=found.compile_seconds,
    )
