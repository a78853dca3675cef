"""Which process of how many is this? Read off flags or what a cluster puts into the environment, in this order:

| source | count, number | coordinator (the host and port of process 0) |
|---|---|---|
| flags `--coordinator --processes --process` | all three given | given |
| environment | JAX_NUM_PROCESSES, JAX_PROCESS_ID | JAX_COORDINATOR_ADDRESS |
| Slurm, in a step of several tasks | SLURM_NTASKS, SLURM_PROCID | the step's first node; port from the job's number |
| Open MPI | OMPI_COMM_WORLD_SIZE, _RANK | the host of mpirun; port from the job's number |
| TPU on GKE | TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_* | the first worker of the first slice; port 8482 |

JAX_COORDINATOR_ADDRESS overrules the coordinator of Slurm, Open MPI and GKE, JAX_COORDINATOR_PORT its port. None of
them: one process. A task of Slurm or Open MPI takes its share of the node's GPUs: all of them where it is the node's only
task or where the launcher has bound them to it already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

_EPHEMERAL = 65536 - 4096  # first of the 4096 ports that jax gives to jobs by their number
_TPU_PORT = 8482


@dataclass(frozen=True, kw_only=True)
class Group:
    """coordinator: "host:port". source: what said so. devices: numbers of the node's GPUs this process takes; None: all."""

    coordinator: str
    processes: int
    process: int
    source: str
    devices: tuple[int, ...] | None = None


def find(environ: Mapping[str, str], coordinator: str = "", processes: int = 0, process: int = -1) -> Group | None:
    """This process's place; None: nothing says there is more than one process.

    Raises:
        ValueError: half of a place is given, or a count or number is impossible.
    """
    given = {"--coordinator": bool(coordinator), "--processes": processes != 0, "--process": process != -1}
    if any(given.values()):
        if not all(given.values()):
            lacking = [name for name, is_given in given.items() if not is_given]
            raise ValueError(f"{' and '.join(lacking)} is missing: --coordinator, --processes, --process go together.")
        return _checked(Group(coordinator=coordinator, processes=processes, process=process, source="flags"))
    for look in (_from_environment, _from_slurm, _from_open_mpi, _from_gke):
        group = look(environ)
        if group is not None:
            return _checked(group)
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={address} is set, but nothing says how many processes there are and which this is; "
            "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, or unset it for one process."
        )
    return None


def _from_environment(environ: Mapping[str, str]) -> Group | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not any(environ.get(name) for name in names[1:]):
        return None
    if lacking := [name for name in names if not environ.get(name)]:
        raise ValueError(f"{', '.join(lacking)} must be set too: {', '.join(names)} go together.")
    count, number = (number(environ, name) for name in names[1:])
    return Group(coordinator=environ[names[0]], processes=count, process=number, source="the environment")


def _from_slurm(environ: Mapping[str, str]) -> Group | None:
    if any(name not in environ for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")):
        return None  # not in a step: `srun` makes one
    tasks = number(environ, "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    if tasks == 1:
        return None
    job = number(environ, "SLURM_JOB_ID")
    here = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    each = _per_node(here)[number(environ, "SLURM_NODEID") if environ.get("SLURM_NODEID") else 0]
    return Group(
        coordinator=_coordinator(environ, first_host(environ["SLURM_STEP_NODELIST"]), _EPHEMERAL + job % 4096),
        processes=tasks,
        process=number(environ, "SLURM_PROCID"),
        source="Slurm",
        devices=_share(environ, number(environ, "SLURM_LOCALID"), each, environ.get("SLURM_GPUS_ON_NODE")),
    )


def _from_open_mpi(environ: Mapping[str, str]) -> Group | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ or number(environ, "OMPI_COMM_WORLD_SIZE") == 1:
        return None
    tasks, each = (number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "LOCAL_SIZE"))
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    found = re.match(r"(\d+)\..*?tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d)", uri)
    port = _EPHEMERAL + (int(found[1]) // 4096 if found else 0) % 4096
    host = found[2] if found else "localhost" if tasks == each else ""
    if not host and not environ.get("JAX_COORDINATOR_ADDRESS"):
        raise ValueError(
            f"this Open MPI does not say on which of the hosts of {tasks} processes number 0 runs; say it: mpirun "
            "-x JAX_COORDINATOR_ADDRESS=HOST:PORT."
        )
    return Group(
        coordinator=_coordinator(environ, host, port),
        processes=tasks,
        process=number(environ, "OMPI_COMM_WORLD_RANK"),
        source="Open MPI",
        devices=_share(environ, number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), each, None),
    )


def _from_gke(environ: Mapping[str, str]) -> Group | None:
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if not workers or not environ.get("TPU_WORKER_ID"):
        return None
    hosts = [worker.partition(":")[0] for worker in workers.split(",")]
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    first = (environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    return Group(
        coordinator=_coordinator(environ, first, _TPU_PORT),
        processes=slices * len(hosts),
        process=int(environ.get("MEGASCALE_SLICE_ID") or 0) * len(hosts) + number(environ, "TPU_WORKER_ID"),
        source="TPU on GKE",
    )


def first_host(nodes: str) -> str:
    """The first of a Slurm list of hosts: "rack[2-3]n[07,09],login" -> "rack2n07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _per_node(tasks: str) -> list[int]:
    """Slurm's "2(x3),1" -> [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    return [int(each) for each, times in found for _ in range(int(times or 1))] or [1]


def _share(environ: Mapping[str, str], local: int, tasks: int, on_node: str | None) -> tuple[int, ...] | None:
    """GPUs of the node's `local`-th of `tasks`; None: all it sees, because it is alone or they were bound to it."""
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    bound = on_node is not None and len(visible) < int(on_node)
    if environ.get("JAX_LOCAL_DEVICE_IDS") or tasks == 1 or bound or len(visible) < tasks or len(visible) % tasks:
        return None
    each = len(visible) // tasks
    return tuple(range(local * each, (local + 1) * each))


def _coordinator(environ: Mapping[str, str], host: str, port: int) -> str:
    return environ.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{environ.get('JAX_COORDINATOR_PORT') or port}"


def _checked(group: Group) -> Group:
    if group.processes < 1 or not 0 <= group.process < group.processes:
        raise ValueError(
            f"process {group.process} of {group.processes} ({group.source}): the number of processes is at least 1, and "
            f"they are numbered from 0 to {max(group.processes, 1) - 1}."
        )
    host, _, port = group.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"coordinator {group.coordinator!r} ({group.source}) is no HOST:PORT; it is where process 0 runs and a free "
            "port there, for instance 10.0.0.1:8476."
        )
    return replace(group, coordinator=f"{host}:{port}")


def line(group: Group) -> str:
    """Who this is and what said so."""
    where = f"process {group.process} of {group.processes}, told by {group.source}; coordinator {group.coordinator}"
    return where if group.devices is None else f"{where}; GPUs {','.join(map(str, group.devices))} of this node's"


def number(environ: Mapping[str, str], name: str) -> int:
    """A whole number of the environment; ValueError for anything else."""
    text = environ.get(name, "")
    if not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"{name}={text!r} is no whole number.")
    return int(text)
