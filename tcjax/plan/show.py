"""A plan as a table for people: what the compiler says, what was counted, what is predicted, in this order."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tcjax.plan.plan import GIB, Plan


def show(plan: Plan) -> None:
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    slices = f" x {plan.slices} slices" if plan.slices > 1 else ""
    where = f"{plan.topology}{slices}, {plan.devices:,} device{'s' * (plan.devices > 1)}"
    console.print(Text(f"{plan.name} on {where}{' (kept from before)' if plan.cached else ''}"))
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    table.add_row("mesh", axes, f"batch {plan.batch:,}")
    of = f"of {plan.available / GIB:.2f} GiB"
    if plan.arguments is None or plan.temporaries is None:
        table.add_row(
            "memory per device", f"{plan.peak / GIB:.2f} {of}", "what the compiler asked for before it gave up"
        )
    else:
        parts = f"arguments {_bytes(plan.arguments)}, temporaries {_bytes(plan.temporaries)}"
        table.add_row("memory per device", f"{plan.peak / GIB:.2f} {of}", parts)
    if plan.executed_flops is not None:
        useful = "" if plan.useful_flops is None else f"{plan.useful_flops / 1e12:,.4g} T useful"
        table.add_row("FLOPs per step", f"{plan.executed_flops / 1e12:,.4g} T executed", useful)
        gathered = " + ".join(f"{kind} {_bytes(size)}" for kind, size in plan.gathered.items() if size >= 2**20)
        dcn = f"DCN {_bytes(plan.dcn_bytes or 0)}" if plan.dcn_bytes else "nothing over DCN"
        table.add_row(
            "sent per device and step",
            f"ICI {_bytes(plan.ici_bytes or 0)}, {dcn}",
            f"gathered: {gathered or 'nothing'}",
        )
    if plan.step_seconds is not None and plan.hours is not None:
        each = ", ".join(f"{name.replace('hbm', 'HBM').replace('ici', 'ICI').replace('dcn', 'DCN')} {seconds:.3g} s"
                         for name, seconds in plan.seconds.items())  # fmt: skip
        table.add_row("predicted step", f"{plan.step_seconds:.3g} s, {plan.bound} bound", each)
        table.add_row(
            "predicted run", f"{plan.hours:,.3g} hours", f"{plan.steps:,} steps, without input and evaluation"
        )
    console.print(table)
    for loop in plan.open_loops:
        console.print(Text(f"counted at its longest: {loop}"))
    if plan.search:
        _tried(console, plan.search)
    console.print(Text(plan.verdict, "bold green" if plan.fits else "bold red"))
    if plan.would_fit:
        console.print(Text(plan.would_fit))


def _tried(console: Console, search: dict) -> None:
    table = Table("mesh", "batch", "memory", "predicted step", "samples/s", box=None, padding=(0, 2, 0, 0))
    largest = [search["largest"]] if "largest" in search else []
    for row in [*search["meshes"], *largest]:
        axes = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        step = f"{row['step_seconds']:.3g} s, {row['bound']}" if row["fits"] else "does not fit"
        rate = f"{row['samples_per_second']:,.0f}" if row["fits"] else ""
        table.add_row(axes, f"{row['batch']:,}", f"{row['peak'] / GIB:.2f} GiB", step, rate)
    console.print(table)


def _bytes(number: int) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / 2**20:.1f} MiB"
