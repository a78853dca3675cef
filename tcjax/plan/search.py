"""What fits, and what would be fastest: meshes and batches tried by the compiler, as few as will do.

    meshes      data x fsdp over the devices, tensor as the run has it: the fewest shares in which weights and state fit by
                their own bytes, twice and four times that, and all of them. More shares take less memory; with no shares
                nothing is gathered. Of those that fit the one whose step is predicted fastest is best, of equals the
                one that sends least
    batch       rows per device: memory grows in a nearly straight line with them, so every answer says what to try next,
                until what fits and what does not are within a sixteenth (a refused program says what it would need)

One answer takes about 15 s and is kept, so that a search that is asked for again is instant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from tcjax.config import Run
from tcjax.plan.plan import GIB, Plan, laid_out, plan, say_nothing
from tcjax.plan.topology import Topology
from tcjax.shapes import held, parts
from tcjax.sharding import MESH_AXES, mesh_sizes

MOST = 8  # answers to ask for on the way to the largest batch
ROWS = 4096  # per device: more are not tried

Say = Callable[[str], None]


def search(run: Run, topology: Topology, *, root: Path, say: Say = say_nothing) -> Plan:
    """The plan of the best mesh at the run's batch, else at the largest batch that fits it; `search` says what was tried.

    The plan does not fit where nothing does.
    """
    tried = [_on_mesh(run, topology, sizes, root, say) for sizes in candidates(run, topology)]
    if not tried:
        return replace(plan(run, topology, root=root, say=say), search={"meshes": []})
    best = min(tried, key=_rank)
    chosen = run.replace(mesh=replace(run.mesh, **best.mesh))
    largest = largest_batch(chosen, topology, root=root, say=say)
    if largest and not best.fits:
        best = largest
    found: dict[str, Any] = {"meshes": [_row(one) for one in tried]}
    if largest:
        found |= {"largest": _row(largest), "rows_per_device": largest.batch // _unit(chosen, topology)}
    return replace(best, search=found, would_fit="" if best.fits else what_fits(largest))


def candidates(run: Run, topology: Topology) -> list[tuple[int, int]]:
    """(data, fsdp) worth a compilation, fewest shares first."""
    tensor = 1 if run.mesh.tensor == -1 else run.mesh.tensor
    if topology.num_devices % (tensor * topology.slices):
        mesh_sizes(run.mesh, topology.num_devices)  # says why
        raise ValueError(
            f"tensor={tensor} does not divide the {topology.num_devices // topology.slices} devices of a slice."
        )
    most = topology.num_devices // tensor // topology.slices
    ways = topology.num_devices // tensor
    if run.data.batch % (ways * run.train.accumulate):
        laid_out(run, topology, data=ways // most, fsdp=most)  # says which batches divide
    shares = [size for size in range(1, most + 1) if most % size == 0]
    _, trainable, frozen = parts(run)

    def arguments(size: int) -> int:
        """Bytes of weights and moments on one device."""
        mesh = AbstractMesh((ways // size, size, tensor), MESH_AXES)
        return 3 * held(trainable, mesh) + held(frozen, mesh)

    fit = [size for size in shares if arguments(size) < topology.chip.hbm_bytes]
    if not fit:
        return []
    wanted = {fit[0], 2 * fit[0], 4 * fit[0], most}
    return [(ways // size, size) for size in fit if size in wanted]


def largest_batch(run: Run, topology: Topology, *, root: Path, say: Say = say_nothing) -> Plan | None:
    """The plan of the largest batch that fits on the run's mesh, to a sixteenth; None if one row per device does not."""
    unit = _unit(run, topology)
    plans: dict[int, Plan] = {}

    def ask(rows: int) -> bool:
        here = laid_out(run, topology, batch=rows * unit)
        plans[rows] = one = plan(here, topology, root=root, say=say)
        say(f"batch {one.batch:,}, {rows} per device: {one.verdict}")
        return one.fits

    if not ask(1):
        return None
    fits, too_many = 1, None
    wanted = max(run.data.batch // unit, 8)
    while len(plans) < MOST and fits < ROWS and (too_many is None or too_many - fits > max(fits // 16, 1)):
        rows = wanted if len(plans) == 1 else _next(plans, fits, too_many)
        if ask(rows):
            fits = rows
        else:
            too_many = rows
    return plans[fits]


def what_fits(largest: Plan | None) -> str:
    """A line for whose config does not fit."""
    if largest is None:
        return "not even one row per device fits on this mesh: more fsdp shares or devices, train.frozen=int8, train.remat=full"
    sizes = ", ".join(f"{axis} {size}" for axis, size in largest.mesh.items())
    return (
        f"a batch of {largest.batch:,} on {sizes} fits ({largest.peak / GIB:.2f} of {largest.available / GIB:.2f} GiB); "
        "with train.accumulate a larger one goes through in microbatches of that size"
    )


def _on_mesh(run: Run, topology: Topology, sizes: tuple[int, int], root: Path, say: Say) -> Plan:
    data, fsdp = sizes
    here = laid_out(run, topology, data=data, fsdp=fsdp)
    one = plan(here, topology, root=root, say=say)
    seconds = "" if one.step_seconds is None else f"; {one.step_seconds:.3g} s a step, predicted"
    say(f"mesh data {data}, fsdp {fsdp}, tensor {here.mesh.tensor}: {one.verdict}{seconds}")
    return one


def _next(plans: dict[int, Plan], fits: int, too_many: int | None) -> int:
    """Where the line through the two nearest answers meets what there is; between what fits and what does not."""
    near = sorted(plans, key=lambda rows: abs(rows - fits))[:2]
    first, second = sorted(near)
    slope = (plans[second].peak - plans[first].peak) / (second - first)
    room = plans[fits].available - plans[fits].peak
    guess = int(fits + 0.98 * room / slope) if slope > 0 else 2 * fits
    if too_many is None:
        return min(max(guess, fits + max(fits // 16, 1)), 64 * fits, ROWS)
    middle = (fits + too_many) // 2
    return guess if fits < guess < too_many else middle


def _unit(run: Run, topology: Topology) -> int:
    data, fsdp, _ = mesh_sizes(run.mesh, topology.num_devices)
    return data * fsdp * run.train.accumulate


def _rank(one: Plan) -> tuple:
    """Those that fit first; the fastest; of equals, which is what compute bound ones are, the one that sends least."""
    return not one.fits, one.step_seconds or 0.0, one.ici_bytes or 0, one.peak


def _row(one: Plan) -> dict[str, Any]:
    return {
        "mesh": one.mesh,
        "batch": one.batch,
        "fits": one.fits,
        "peak": one.peak,
        "step_seconds": one.step_seconds,
        "bound": one.bound,
        "samples_per_second": one.batch / one.step_seconds if one.step_seconds else None,
    }
