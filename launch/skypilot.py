"""A SkyPilot task file for one TPU slice or GPU nodes of whatever cloud has them: `sky jobs launch FILE` runs it.

SkyPilot's managed jobs bring a preempted cluster back; a process lost on a living one is begun again by a supervisor on each
host, because SkyPilot kills all other hosts with 137 when one ends and could not tell an error from a lost process by codes.
A study is one file, launched once per run with RUN set.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import mesh, slices, yaml
from launch.forward import supervised
from launch.job import Job, LaunchError, called

PORT = 6002  # of the coordinator on GPU nodes

FLAGS = {
    "--accelerator": "accelerator",
    "--infra": "infra",
    "--spot": "spot",
    "--repository": "repository",
    "--ref": "ref",
    "--disk": "disk",
}

SETUP = (
    "command -v uv > /dev/null || python3 -m pip install --quiet --user uv",
    'export PATH="$HOME/.local/bin:$PATH"',
    "test -d .venv || uv venv --quiet --python 3.11 .venv",
    "uv pip install --quiet --python .venv/bin/python --editable '.[{extra}]'",
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where to look for machines, and how a host is made ready.

    accelerator: v6e:4x4 for a TPU slice, h100:2x8 for two nodes of eight GPUs. infra: cloud, cloud/region or
    cloud/region/zone; empty for wherever it is cheapest. spot: machines that can be taken away. runtime: a TPU's image; empty
    for the generation's own. disk: gigabytes of a machine's disk; 0 for SkyPilot's default. repository: cloned on every host;
    empty to send this folder. ref: branch, tag or commit of it. setup: commands that make a host ready; {extra} is tpu or
    cuda. mounts: {path on a host: gs:// or s3:// bucket}; the project lies in ~/sky_workdir.
    """

    accelerator: str
    infra: str = ""
    spot: bool = False
    runtime: str = ""
    disk: int = 0
    repository: str = ""
    ref: str = ""
    setup: tuple[str, ...] = SETUP
    mounts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        target = slices.parse(self.accelerator)
        if isinstance(target, slices.Slice) and not (target.accelerator_type and target.usual):
            raise LaunchError(
                f"accelerator {self.accelerator}: SkyPilot asks for {target.accelerator_type}, which is another shape; "
                f"use the route tpu_vm."
            )
        if self.ref and not self.repository:
            raise LaunchError(f"ref {self.ref} needs a repository; without one this folder is sent.")
        for path, source in self.mounts.items():
            if "://" not in source:
                raise LaunchError(f"mounts {path!r} = {source!r}: takes a bucket's address, as in gs://my-runs.")


def text(job: Job, profile: Profile) -> str:
    """The task file, with the command that launches it on top."""
    target = slices.parse(profile.accelerator)
    if said := list(mesh.faults(job.command, target.devices)):
        raise LaunchError("; ".join(said) + ".")
    lines = [f"# {shlex.join(words)}\n" for words in _launches(job)]
    return "".join(lines) + yaml.dump(_task(job, profile, target))


def submit(job: Job, profile: Profile) -> int:
    """Write the file beside the logs and launch it as a managed job, once per run; the worst exit code."""
    path = _path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(job, profile))
    return max(called(words) for words in _launches(job))


def _path(job: Job) -> Path:
    return Path(job.log_folder) / f"{job.name.lower()}.sky.yaml"


def _launches(job: Job) -> list[list[str]]:
    name, path = job.name.lower(), str(_path(job))
    launch = ["sky", "jobs", "launch", "--yes", "--detach-run"]
    if not job.runs:
        return [[*launch, "--name", name, path]]
    return [[*launch, "--name", f"{name}-r{run}", "--env", f"RUN={run}", path] for run in range(1, job.runs + 1)]


def _task(job: Job, profile: Profile, target: slices.Slice | slices.Gpus) -> dict[str, Any]:
    on_tpu = isinstance(target, slices.Slice)
    resources: dict[str, Any] = {"infra": profile.infra} if profile.infra else {}
    if isinstance(target, slices.Slice):
        resources["accelerators"] = f"tpu-{target.accelerator_type}:1"
        resources["accelerator_args"] = {"runtime_version": profile.runtime or target.facts.runtime}
    else:
        resources["accelerators"] = f"{target.sky_name}:{target.per_host}"
    resources["use_spot"] = profile.spot
    if profile.disk:
        resources["disk_size"] = profile.disk
    resources["job_recovery"] = {"max_restarts_on_errors": 0}
    work: Any = "."
    if profile.repository:
        work = {"url": profile.repository} | ({"ref": profile.ref} if profile.ref else {})
    env = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "tpu,cpu" if on_tpu else "cuda,cpu"} | dict(job.env)
    task: dict[str, Any] = {
        "name": job.name.lower(),
        "num_nodes": 1 if on_tpu else target.hosts,
        "workdir": work,
        "resources": resources,
        "envs": env | ({"RUN": "1"} if job.runs else {}),
    }
    if profile.mounts:
        mounts = {path: {"source": source, "mode": "MOUNT"} for path, source in profile.mounts.items()}
        task["file_mounts"] = mounts
    extra = "tpu" if on_tpu else "cuda"
    task["setup"] = "".join(f"{line.replace('{extra}', extra)}\n" for line in ("set -e", *profile.setup))
    return task | {"run": _run(job, target)}


def _run(job: Job, target: slices.Slice | slices.Gpus) -> str:
    lines = ['export PATH="$PWD/.venv/bin:$PATH"']
    if isinstance(target, slices.Gpus) and target.hosts > 1:
        lines += [
            f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"',
            'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
        ]
    lines.append(f"set -- {shlex.join(job.command)}" + (' --run "$RUN"' if job.runs else ""))
    return "\n".join(lines) + "\n" + supervised(job.restarts)
