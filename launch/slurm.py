"""An sbatch script: one step of srun over the allocation, requeued when it was preempted or lost a process.

What happens at a preemption, a time limit or `scancel --signal=TERM`: SIGTERM reaches every process, they save one agreed
step and end with 143; the batch script sees it and puts its own job back into the queue (`scontrol requeue`), up to
`--restarts` times; started again, the same command goes on from its newest checkpoint. An error of the training itself
(1 or 2) ends the job. Of several codes the first one counts: srun kills the other processes for it, and theirs say
nothing. A study is one array job; each of its runs is requeued by itself.

Source of the signals' and ids' meaning: Slurm's man pages sbatch, srun, scancel and scontrol; tried on 22.05.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job, LaunchError, called

# Above Linux's ephemeral ports (32768-60999), as jax's own detection of Slurm counts.
FIRST_PORT, PORTS = 61440, 4096


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A Slurm cluster's partition.

    nodes: machines of one job. tasks_per_node: processes on each; 1 sees all its GPUs, or as many as GPUs. gpus_per_node:
    0 on CPU nodes. cpus_per_task: 0 leaves it to the cluster. memory: of a node, as in 200G. partition: as in `sinfo`.
    account: who pays. qos: quality of service. time: limit, as in 24:00:00 or 2-00:00:00. constraint: features of nodes.
    exclusive: nodes shared with nobody. array_limit: runs of a study at the same time, 0 for all. coordinator_host: the
    host on which the processes meet; empty is the job's first node. setup: lines of shell before the command, as in
    "module load cuda". options: further sbatch options, as in "--mail-type=END".
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    memory: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    constraint: str = ""
    exclusive: bool = False
    array_limit: int = 0
    coordinator_host: str = ""
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("tasks_per_node", 1), ("gpus_per_node", 0), ("array_limit", 0)):
            if getattr(self, name) < least:
                raise LaunchError(f"slurm: {name} {getattr(self, name)} is below {least}.")
        if self.gpus_per_node and self.tasks_per_node not in (1, self.gpus_per_node):
            raise LaunchError(
                f"slurm: tasks_per_node {self.tasks_per_node} with gpus_per_node {self.gpus_per_node}: takes 1 process "
                f"for all GPUs of a node, or one for each ({self.gpus_per_node})."
            )
        wrong = [option for option in self.options if not re.fullmatch(r"--[a-z][^\n]*", option)]
        if wrong:
            raise LaunchError(f"slurm: options {wrong}: each is one sbatch option, as in --mail-type=END.")


FLAGS = {
    "--nodes": "nodes",
    "--tasks-per-node": "tasks_per_node",
    "--gpus-per-node": "gpus_per_node",
    "--cpus-per-task": "cpus_per_task",
    "--memory": "memory",
    "--partition": "partition",
    "--account": "account",
    "--qos": "qos",
    "--time": "time",
    "--constraint": "constraint",
    "--exclusive": "exclusive",
    "--array-limit": "array_limit",
    "--coordinator-host": "coordinator_host",
}


def text(job: Job, profile: Profile) -> str:
    """The batch script."""
    study, tasks = job.runs > 0, profile.nodes * profile.tasks_per_node
    options = ["#SBATCH " + option for option in _options(job, profile)]
    # In an array the job id of one run may be the id of all: only the pair names a run.
    me = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if study else '"$SLURM_JOB_ID"'
    codes = f"{shlex.quote(f'{job.log_folder}/{job.name}')}-$me.codes"
    command = shlex.join(job.command) + (' --run "$SLURM_ARRAY_TASK_ID"' if study else "")
    sizes = f"--nodes={profile.nodes} --ntasks={tasks} --ntasks-per-node={profile.tasks_per_node}"
    if profile.cpus_per_task:  # srun does not inherit it
        sizes += f" --cpus-per-task={profile.cpus_per_task}"
    lines = [
        "#!/bin/bash",
        f"# To send it: mkdir -p {shlex.quote(job.log_folder)} && sbatch THIS_FILE",
        *options,
        "",
        f"me={me}",
        f"codes={codes}",
        "# SIGTERM reaches this script alone before the time limit; the step's processes get it from here.",
        "stopped=",
        "trap 'stopped=1; scancel --signal=TERM \"$me\" 2> /dev/null' TERM",
        "",
        *_environment(job, profile, tasks),
        *profile.setup,
        "",
        "# The first process that fails says why; srun kills the others for it.",
        ': > "$codes"',
        "export codes",
        "code=143",
        'if [ -z "$stopped" ]; then',
        f"  srun {sizes} --kill-on-bad-exit=1 bash -c '",
        '    trap : TERM; "$@"; code=$?; [ $code -eq 0 ] || echo $code >> "$codes"; exit $code',
        f"  ' rank {command} &",
        "  step=$!",
        '  while stopped=; wait "$step"; code=$?; [ -n "$stopped" ]; do :; done',
        "fi",
        '[ $code -eq 0 ] || ! read -r first < "$codes" || code=$first',
        'rm -f "$codes"',
        "",
        "# 42: a process was lost; 128 and above: a signal, after SIGTERM with a save; 130: somebody pressed Ctrl-C.",
        "if [ $code -eq 42 ] || { [ $code -ge 128 ] && [ $code -ne 130 ]; }; then",
        '  state=$(squeue --noheader --jobs="$me" --format=%T) times=${SLURM_RESTART_COUNT:-0}',
        '  if [ "$state" != RUNNING ]; then  # cancelled, or Slurm requeues it itself',
        '    echo "launch: job $me ended with $code and is ${state:-gone}" >&2',
        f'  elif [ "$times" -lt {job.restarts} ]; then',
        f'    echo "launch: job $me ended with $code and is requeued, $((times + 1)) of {job.restarts} times" >&2',
        '    scontrol requeue "$me"',
        "  else",
        '    echo "launch: job $me ended with $code and came back $times times: enough" >&2',
        "  fi",
        "fi",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def submit(job: Job, profile: Profile) -> int:
    """Send the script through sbatch, from the folder in which it shall run."""
    script = text(job, profile)
    Path(job.log_folder).mkdir(parents=True, exist_ok=True)  # Slurm writes no log where there is no folder
    return called(["sbatch"], stdin=script, where="on a login node of the cluster")


def _options(job: Job, profile: Profile) -> list[str]:
    study = job.runs > 0
    limit = f"%{profile.array_limit}" if profile.array_limit else ""
    facts = {
        "job-name": job.name,
        "output": f"{job.log_folder}/%x-{'%A_%a' if study else '%j'}.log",
        "open-mode": "append",
        "array": f"1-{job.runs}{limit}" if study else "",
        "nodes": str(profile.nodes),
        "ntasks-per-node": str(profile.tasks_per_node),
        "gpus-per-node": str(profile.gpus_per_node or ""),
        "cpus-per-task": str(profile.cpus_per_task or ""),
        "mem": profile.memory,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "time": profile.time,
        "constraint": profile.constraint,
        "signal": f"B:TERM@{job.grace}",
    }
    for name, value in facts.items():
        if "\n" in value:
            raise LaunchError(f"slurm: {name} {value!r} has more than one line.")
    found = [f"--{name}={shlex.quote(value)}" for name, value in facts.items() if value]
    return [*found, "--requeue", *(["--exclusive"] if profile.exclusive else []), *profile.options]


def _environment(job: Job, profile: Profile, tasks: int) -> list[str]:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]
    if tasks > 1:
        first = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        host = shlex.quote(profile.coordinator_host) if profile.coordinator_host else first
        port = f"$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))"
        lines.append(f"export JAX_COORDINATOR_ADDRESS={host}:{port}")
    return lines
