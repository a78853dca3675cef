"""The trainer's own step, compiled ahead of time for a machine nobody here owns: arrays are shapes with shardings.

    parts, state, batch as shapes      tcjax.shapes, laid by tcjax.sharding on a mesh of the topology's devices
    make_step, jit_step                tcjax.train.step, as tcjax.train.loop calls them
    "program"     2 s   XLA's text right after SPMD partitioning: every device's own program, its collectives by name
    "memory"      5 s   optimised, scheduled, every buffer at its place in memory, or refused: the compiler's last word on
                        whether it fits. It writes this assignment to its dump and then generates code for minutes
    "code"      120 s   an executable, which shows that the code generator takes the program as well

Seconds are those of LLaVA-1.5-7B on two CPU cores, whatever the number of chips; memory is 0.8 GB up to "memory", 3 GB for
"code". Runs in a process of its own (tcjax/plan/worker.py), which ends when it has its answer, the compiler with it.
"""

from __future__ import annotations

import re
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

DEPTHS = ("program", "memory", "code")

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = (
    r"Used (?P<needs>[\d.]+)(?P<n>[KMGT]?) of (?P<has>[\d.]+)(?P<h>[KMGT]?) hbm",
    r"\((?P<needs>[\d.]+)(?P<n>[KMGT]?)B?\) exceeds available HBM \((?P<has>[\d.]+)(?P<h>[KMGT]?)B?\)",
)
_PARTITIONED = re.compile(r"\.after_(tpu-)?spmd-partitioning\.before_.*\.txt$")
_ALLOCATION = re.compile(r"^allocation \d+: (?:0x[0-9a-f]+, )?size (\d+)(?:, color (\d+))?(.*):$", re.MULTILINE)
_HBM = ("", "0")  # colours of buffers; the others are on the chip or in the host's memory


class DoesNotFit(ValueError):
    """needs, has: bytes of one device, as the compiler counts them; it stops at the first thing that is too much."""

    def __init__(self, needs: int, has: int):
        super().__init__(f"does not fit: needs {needs / 2**30:.2f} GiB of {has / 2**30:.2f} GiB per device.")
        self.needs, self.has = needs, has


class Memory(NamedTuple):
    """Bytes of one device. peak: what has to be there, arguments included. alias: output that lies where arguments lay."""

    peak: int
    available: int
    arguments: int
    temporaries: int
    output: int
    alias: int


class Compiled(NamedTuple):
    """memory: None at depth "program". hlo: text right after SPMD partitioning, "" for one device. seconds: of XLA alone."""

    memory: Memory | None
    hlo: str
    seconds: float


class Step(NamedTuple):
    """What there is to compile: `jitted` of `arguments`, shapes that lie on `mesh`.

    function: the pure step. share: what one device sees of its arguments, with every weight whole.
    """

    function: Any
    jitted: Any
    arguments: tuple[Any, ...]
    share: tuple[Any, ...]
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
    own = abstract_batch(run, run.data.batch // (mesh.shape["data"] * mesh.shape["fsdp"]))
    return Step(step, jit_step(step, state, mesh), (*laid, batch, number), (state, frozen, own, number), mesh)


def mesh_of(run: Run, topology: Topology) -> Mesh:
    return make_mesh(run.mesh, topology.devices())


def compile_step(step: Step, topology: Topology, dump: Path, depth: str = "memory") -> Compiled:
    """Compile it to this depth, one of DEPTHS; the compiler may be left behind in a thread of its own.

    Args:
        dump: an empty folder for what the compiler writes; it may go on writing.

    Raises:
        DoesNotFit: the compiler, or what it needs against what there is, says so.
    """
    lowered = step.jitted.trace(*step.arguments).lower()
    options = {"xla_dump_to": str(dump), "xla_dump_hlo_pass_re": ".*spmd-partitioning", **_options(topology)}
    start, found = time.perf_counter(), {}

    def work() -> None:
        try:
            found["executable"] = lowered.compile(compiler_options=options)
        except Exception as error:
            found["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and not _reached(dump, depth, step.mesh.size):
        thread.join(0.1)
    seconds = time.perf_counter() - start
    if "error" in found:
        raise _refused(found["error"]) from found["error"]
    memory = None
    if "executable" in found:
        memory = _memory(found["executable"].memory_analysis(), topology)
    elif depth == "memory":
        memory = _assigned(dump, topology)
    if memory and memory.peak > memory.available:
        raise DoesNotFit(memory.peak, memory.available)
    return Compiled(memory, _partitioned(dump), seconds)


def _options(topology: Topology) -> dict[str, Any]:
    """Matrices by cuBLAS: without a GPU to try tile sizes on, XLA's own (Triton) kernels refuse some small shapes."""
    return {} if topology.chip.axes else {"xla_gpu_enable_triton_gemm": False}


def _lying(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _reached(dump: Path, depth: str, devices: int) -> bool:
    partitioned = devices == 1 or bool(_partitioned(dump))
    if depth == "program":
        return partitioned
    # What libtpu and the CUDA compiler write first once they have accepted an assignment.
    beyond = any(dump.glob("*_after_buffer_assignment.txt")) or any(dump.glob("*.ir-no-opt.ll"))
    return depth == "memory" and beyond and partitioned


def _partitioned(dump: Path) -> str:
    """The text of the largest module that is partitioned and written to its end; "" if there is none yet."""
    files = [path for path in dump.glob("*.txt") if _PARTITIONED.search(path.name)]
    if not files:
        return ""
    text = max(files, key=lambda path: path.stat().st_size).read_text()
    return text if text.rstrip().endswith("}") and "\nENTRY " in text else ""


def _assigned(dump: Path, topology: Topology) -> Memory:
    """The compiler's buffer assignment, of its largest module."""
    text = max((path.read_text() for path in dump.glob("*-buffer-assignment.txt")), key=len)
    peak = arguments = temporaries = output = alias = 0
    for number, colour, kind in _ALLOCATION.findall(text):
        if colour not in _HBM:
            continue
        size = int(number)
        peak += size
        given, live = ", parameter " in kind, "maybe-live-out" in kind
        arguments += size * given
        output += size * live
        alias += size * (given and live)
        temporaries += size * ("preallocated-temp" in kind)
    return Memory(peak, topology.chip.hbm_bytes, arguments, temporaries, output, alias)


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
    return ValueError(f"the compiler refused the step: {text.partition(chr(10))[0]}")
