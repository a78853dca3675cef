"""The trainer's own step, compiled ahead of time for a machine nobody here owns: arrays are shapes with shardings.

    parts, state, batch as shapes      tcjax.shapes, laid by tcjax.sharding on a mesh of the topology's devices
    make_step, jit_step                tcjax.train.step, as tcjax.train.loop calls them
    program                            XLA's text right after SPMD partitioning: every device's own program, collectives in
                                       it by name, loops not yet unrolled or pipelined (later the compiler splits and hides them)

Cost: 40 to 130 s on two CPU cores and below 2 GB for a 7B to 70B decoder, whatever the number of chips. A program that does
not fit is refused by the compiler in seconds. Runs in a process of its own (tcjax/plan/worker.py).
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tcjax.config import Run
from tcjax.plan.topology import Topology
from tcjax.shapes import abstract_batch, parts
from tcjax.sharding import check_batch, make_mesh, shardings
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import compute_dtype, init
from tcjax.train.step import jit_step, make_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = (
    r"Used (?P<needs>[\d.]+)(?P<n>[KMGT]?) of (?P<has>[\d.]+)(?P<h>[KMGT]?) hbm",
    r"\((?P<needs>[\d.]+)(?P<n>[KMGT]?)B?\) exceeds available HBM \((?P<has>[\d.]+)(?P<h>[KMGT]?)B?\)",
)
_PARTITIONED = re.compile(r"\.after_(tpu-)?spmd-partitioning\.before_.*\.txt$")


class DoesNotFit(ValueError):
    """needs, has: bytes of one device, as the compiler counts them; it stops at the first thing that is too much."""

    def __init__(self, needs: int, has: int):
        super().__init__(f"does not fit: needs {needs / 2**30:.2f} GiB of {has / 2**30:.2f} GiB per device.")
        self.needs, self.has = needs, has


class Memory(NamedTuple):
    """Bytes of one device. peak: at the worst moment, arguments included. alias: output that lies where arguments lay."""

    peak: int
    available: int
    arguments: int
    temporaries: int
    output: int
    alias: int


class Compiled(NamedTuple):
    """mesh: its devices. memory: None of a probe. hlo: text right after SPMD partitioning. seconds: of XLA alone."""

    mesh: Mesh
    memory: Memory | None
    hlo: str
    seconds: float


class Step(NamedTuple):
    """What there is to compile: `function` pure and `jitted` of `arguments`, shapes that lie on `mesh`."""

    function: Any
    jitted: Any
    arguments: tuple[Any, ...]
    mesh: Mesh


def step_of(run: Run, mesh: Mesh) -> Step:
    """The run's step on this mesh, nothing compiled. ValueError if the batch does not divide."""
    how = run.train
    check_batch(run.data.batch, mesh, how.accumulate)
    graphdef, trainable, frozen = parts(run)
    optimiser = make_optimiser(how)
    state = jax.eval_shape(lambda trainable: init(trainable, optimiser), trainable)
    step = make_step(
        graphdef,
        optimiser,
        accumulate=how.accumulate,
        dtype=compute_dtype(how.compute),
        seed=how.seed,
        steps=how.steps,
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = jax.tree.map(lambda leaf: _lying(leaf, rows), abstract_batch(run, run.data.batch))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    laid = (jax.tree.map(_lying, tree, shardings(tree, mesh)) for tree in (state, frozen))
    return Step(step, jit_step(step, state, mesh), (*laid, batch, number), mesh)


def mesh_of(run: Run, topology: Topology) -> Mesh:
    return make_mesh(run.mesh, topology.devices())


def compile_step(step: Step, topology: Topology, *, probe: bool = False) -> Compiled:
    """Compile it. probe: only until it is partitioned, or refused; the compiler then goes on in a thread of its own.

    Raises:
        DoesNotFit: the compiler, or the sum of what it needs against what there is, says so.
    """
    lowered = step.jitted.trace(*step.arguments).lower()
    with tempfile.TemporaryDirectory(prefix="tcjax-plan-", ignore_cleanup_errors=True) as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_pass_re": ".*spmd-partitioning"}
        start, found = time.perf_counter(), {}

        def work() -> None:
            try:
                found["executable"] = lowered.compile(compiler_options=options)
            except Exception as error:
                found["error"] = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive() and not (probe and _partitioned(Path(dump))):
            thread.join(0.2)
        seconds = time.perf_counter() - start
        if "error" in found:
            raise _refused(found["error"]) from found["error"]
        hlo = _partitioned(Path(dump))
    memory = None if probe else _memory(found["executable"].memory_analysis(), topology)
    if memory and memory.peak > memory.available:
        raise DoesNotFit(memory.peak, memory.available)
    return Compiled(step.mesh, memory, hlo, seconds)


def _lying(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _partitioned(dump: Path) -> str:
    """The text of the largest module that is partitioned and written to its end; "" if there is none yet."""
    files = [path for path in dump.glob("*.txt") if _PARTITIONED.search(path.name)]
    if not files:
        return ""
    text = max(files, key=lambda path: path.stat().st_size).read_text()
    return text if text.rstrip().endswith("}") and "\nENTRY " in text else ""


def _memory(stats: Any, topology: Topology) -> Memory:
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    output, alias = stats.output_size_in_bytes, stats.alias_size_in_bytes
    peak = getattr(stats, "peak_memory_in_bytes", 0) or arguments + temporaries + output - alias
    return Memory(peak, topology.chip.hbm_bytes, arguments, temporaries, output, alias)


def _refused(error: Exception) -> Exception:
    text = str(error)
    for pattern in _USED if "RESOURCE_EXHAUSTED" in text else ():
        if found := re.search(pattern, text):
            needs = float(found["needs"]) * _UNITS[found["n"]]
            return DoesNotFit(int(needs), int(float(found["has"]) * _UNITS[found["h"]]))
    return error
