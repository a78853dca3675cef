"""The verb that says whether a run fits a machine and what it would cost: plan.

Exit code 0: it fits. 3: it does not; what would is printed. 2: the question is wrong, or the compiler is missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from tcjax.arguments import parse_run

DOES_NOT_FIT = 3

_USAGE = """usage: tcjax plan CONFIG --topology v5e:16x16 [--slices 2] [--batch N] [--search] [--full] [--json] [--FIELD X ...]

CONFIG is file.py or file.py:function, as of `tcjax train`; any field can be given, the mesh for instance: --mesh.fsdp 8.
Topologies: v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2, h100:8, h200:8, h100:2x8 (hosts x GPUs) and their like."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile a run's step for TPUs or GPUs nobody here owns: does it fit, what does it move, how long might it take.

    topology: chip and size, v5e:16x16, v5p:4x4x4, h200:8, h100:2x8. slices: TPU slices joined by the data centre's network.
    batch: instead of the config's. search: try meshes and batches. full: generate code too, which takes minutes and 3 GB.
    json: everything, for machines.
    """

    topology: str
    slices: int = 1
    batch: int = 0
    search: bool = False
    full: bool = False
    json: bool = False


def plan(arguments: list[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: planning never takes an accelerator
    if not arguments or arguments[0].startswith("-"):
        print(_USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2

    from tcjax import content

    config, root = content.find(arguments[0])
    asked, run = parse_run(Plan, config(), "plan", arguments)
    if asked.batch < 0:
        raise ValueError(f"--batch {asked.batch}: takes a whole number from 1 up; left out, the config decides.")
    if asked.batch:
        run = run.replace(data=dataclasses.replace(run.data, batch=asked.batch))
    return _planned(run, asked, root)


def _planned(run: Any, asked: Plan, root: Path) -> int:
    from tcjax.plan.plan import plan, say_on_stderr
    from tcjax.plan.search import largest_batch, search, what_fits
    from tcjax.plan.show import show
    from tcjax.plan.topology import require, topology

    where = topology(asked.topology, asked.slices)
    require(where.chip)
    if asked.search:
        found = search(run, where, root=root, say=say_on_stderr)
    else:
        found = plan(run, where, root=root, depth="code" if asked.full else "memory", say=say_on_stderr)
        if not found.fits:
            say_on_stderr(f"{found.verdict}; looking for what would")
            largest = largest_batch(run, where, root=root, say=say_on_stderr)
            found = dataclasses.replace(found, would_fit=what_fits(largest))
    if asked.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(found)
    return 0 if found.fits else DOES_NOT_FIT
