"""A shell script that runs a job on Cloud TPU VMs by queued resources: create, set up, run, delete. For v4, v5e, v5p, v6e.

The script is printed to be read; `bash NAME.sh` does all of it, `bash NAME.sh STEP` one step. On every host a small
supervisor, detached from the connection, runs the command, passes SIGTERM on and begins again on exit code 42 and on signals;
jax finds its processes by the TPU's own metadata. Several slices (`slices`) are one queued resource of several nodes, joined by
MEGASCALE_* variables. A slice taken away is requested anew, and the run goes on from its newest checkpoint, if `mounts` put
its folder in a bucket.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from launch import mesh, slices, tpu_script
from launch.job import Job, LaunchError, called

FLAGS = {
    "--accelerator": "accelerator",
    "--slices": "slices",
    "--project": "project",
    "--zone": "zone",
    "--capacity": "capacity",
    "--hours": "hours",
    "--network": "network",
    "--subnetwork": "subnetwork",
    "--service-account": "service_account",
    "--repository": "repository",
    "--ref": "ref",
}

CAPACITIES = ("on-demand", "spot", "reserved", "flex-start")
NAME = re.compile(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?")

SETUP = (
    "python3 -m pip install --quiet --user uv",  # the images' Python is older than tcjax takes
    "test -d .venv || ~/.local/bin/uv venv --quiet --python 3.11 .venv",
    "~/.local/bin/uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'",
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the slices come from, and how a host is made ready.

    accelerator: v5e:4x4, v5p:4x4x4 and so on. slices: of that shape, joined over the data centre's network. project, zone:
    of Google Cloud. capacity: on-demand, spot, reserved or flex-start. hours: after which a flex-start slice ends, 168 at
    most. network, subnetwork: of the hosts; empty for the project's default. internal_ips: hosts without addresses of their
    own, reached through the network. service_account: which may read and write the buckets. runtime: the hosts' image; empty
    for the generation's own. repository: cloned on every host; empty to send the commit checked out here. ref: branch, tag
    or commit of it. setup: commands that make a host ready, in the project's folder. mounts: {folder: bucket}, mounted with
    gcsfuse on every host; a relative folder lies in the project.
    """

    accelerator: str
    slices: int = 1
    project: str
    zone: str
    capacity: str = "on-demand"
    hours: int = 24
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    service_account: str = ""
    runtime: str = ""
    repository: str = ""
    ref: str = ""
    setup: tuple[str, ...] = SETUP
    mounts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        target = slices.parse(self.accelerator)
        if isinstance(target, slices.Gpus):
            raise LaunchError(
                f"accelerator {self.accelerator}: this route is for TPUs; use slurm, gke_jobset or skypilot."
            )
        _ = target.accelerator_type  # refuses what is had on GKE alone
        if self.slices < 1:
            raise LaunchError(f"slices {self.slices}: takes a whole number from 1 up.")
        if self.capacity not in CAPACITIES:
            raise LaunchError(f"capacity {self.capacity!r}: choose of {', '.join(CAPACITIES)}.")
        if self.capacity == "flex-start" and target.generation not in ("v5e", "v6e"):
            raise LaunchError(
                f"capacity flex-start is for v5e and v6e, not {target.generation}; take spot or reserved."
            )
        if not 1 <= self.hours <= 168:
            raise LaunchError(f"hours {self.hours}: a flex-start slice lasts 1 to 168 hours (7 days).")
        if not self.project or not self.zone:
            raise LaunchError("tpu_vm needs a project and a zone: --project PROJECT --zone us-central2-b.")
        if self.ref and not self.repository:
            raise LaunchError(f"ref {self.ref} needs a repository; without one the commit checked out here is sent.")
        for folder, bucket in self.mounts.items():
            if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]+", bucket):
                raise LaunchError(f"mounts {folder!r} = {bucket!r}: takes a bucket's bare name, as in my-runs.")


def text(job: Job, profile: Profile) -> str:
    """The script. For a study it starts itself once per run, each on a queued resource of its own."""
    target, name = slices.parse(profile.accelerator), job.name.lower()
    assert isinstance(target, slices.Slice)
    if said := list(mesh.faults(job.command, target.devices * profile.slices, profile.slices)):
        raise LaunchError("; ".join(said) + ".")
    longest = f"{name}-r{job.runs}" if job.runs else name
    if not NAME.fullmatch(longest + (f"-{profile.slices - 1}" if profile.slices > 1 else "")):
        raise LaunchError(
            f"name {name!r}: a queued resource and its nodes are called by small letters, digits and '-', a letter first, "
            f"at most 62 with their numbers; give another --name."
        )
    nodes = [f'"$NAME-{each}"' for each in range(profile.slices)] if profile.slices > 1 else ['"$NAME"']
    parts = [
        tpu_script.head(job, profile, name),
        tpu_script.study(job) if job.runs else "",
        f"place=({shlex.join([f'--project={profile.project}', f'--zone={profile.zone}'])})\n"
        f"nodes=({' '.join(nodes)})\nreach=({'--internal-ip' if profile.internal_ips else ''})\n",
        tpu_script.cloud(profile, target),
        tpu_script.hosts(job, profile),
        tpu_script.steps(job, profile),
        tpu_script.everything(job),
    ]
    return "\n".join(part for part in parts if part)


def submit(job: Job, profile: Profile) -> int:
    """Write the script beside the logs and run it; it stays there for `follow`, `stop` and `delete`."""
    script = Path(job.log_folder) / f"{job.name.lower()}.tpu_vm.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text(job, profile))
    return called(["bash", str(script)])
