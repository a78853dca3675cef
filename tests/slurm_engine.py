"""A real Slurm on this one machine: munged, slurmctld and two slurmd in a temporary folder, gone at the end.

    with engine() as slurm:
        slurm("sbatch", "job.sh")

Needs root and Debian's packages slurm-wlm and munge (tests/install_slurm). The nodes are called n1 and n2, which no name
server knows: a job says `coordinator_host = "127.0.0.1"`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SBIN = "/usr/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "setpriv")
MARK = "TCJAX_SLURM_ENGINE"  # in the environment of every process of ours, the jobs' too

CONFIG = """
ClusterName=rehearsal
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
KillWait=20
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=8 RealMemory=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def lacking() -> str:
    """Why no engine can be brought up here; empty if it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing:
        return f"Slurm is not installed (no {', '.join(missing)}); tests/install_slurm installs it on Debian"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root here"


@dataclass(frozen=True)
class Engine:
    """A running Slurm. Called with words it runs one of its programs and returns what that printed."""

    folder: Path
    environ: dict[str, str]

    def __call__(self, *words: str, cwd: Path | None = None) -> str:
        done = subprocess.run(words, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The facts of `scontrol show job`: JobState, ExitCode, Restarts and more."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def hurry(self, number: str) -> None:
        """Wait for a job's requeue and start it again soon: Slurm would let two minutes pass.

        Not in the same second: slurmd refuses a job of its number that began before the requeue, to the second.
        """
        self.wait(lambda: self.state(number) == "PENDING", 30, f"the requeue of job {number}")
        self("scontrol", "update", f"jobid={number}", "StartTime=now+2")

    def ended(self, number: str, seconds: float = 60) -> dict[str, str]:
        """The facts of a job when it is done for good."""
        last = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.state(number) in last, seconds, f"the end of job {number}")
        return self.job(number)

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Until `done()`; TimeoutError naming `what`, with the queue and the newest lines of the logs."""
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                logs = [
                    f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.log")
                ]
                raise TimeoutError(f"{what} did not happen within {seconds} s.\n{self('squeue')}\n" + "\n".join(logs))
            time.sleep(0.1)


@contextmanager
def engine() -> Iterator[Engine]:
    """A controller and two nodes, idle; every process is ended and the folder removed at the end, also after a failure."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path has to be short, pytest's folders are not
    environ = os.environ | {"PATH": _path(), "SLURM_CONF": f"{folder}/slurm.conf", MARK: str(folder)}
    slurm, daemons = Engine(folder, environ), []
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=_ports()))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        daemons.append(
            _start(slurm, "munged", "--foreground", "--force", *(f"--{a}={folder}/munge.{b}" for a, b in munge.items()))
        )
        slurm.wait((folder / "munge.socket").exists, 10, "munged's socket")
        daemons.append(_start(slurm, "slurmctld", "-D"))
        daemons += [_start(slurm, "slurmd", "-D", "-N", node) for node in ("n1", "n2")]
        slurm.wait(lambda: idle(slurm), 30, "two idle nodes")
        yield slurm
    finally:
        end = time.monotonic() + 20
        while (left := ours(folder)) and time.monotonic() < end:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for daemon in daemons:
                daemon.poll()  # what has ended is no longer listed with its environment
            time.sleep(0.05)
        for daemon in daemons:
            daemon.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def idle(slurm: Engine) -> bool:
    """Whether both nodes have nothing to do, the last job's rest included."""
    try:
        states = slurm("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
    except (RuntimeError, subprocess.TimeoutExpired):
        return False  # the controller does not answer yet
    return states.split() == ["idle", "idle"]


def ours(folder: Path) -> list[int]:
    """Processes of this engine, its jobs' included."""
    mark, found = f"{MARK}={folder}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # has just ended
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def _start(slurm: Engine, *words: str) -> subprocess.Popen:
    """A daemon that goes when pytest is killed."""
    with (slurm.folder / f"{words[0]}.out").open("a") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words],
            env=slurm.environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _ports() -> tuple[int, int, int]:
    """Three free ports, the last two in a row."""
    while True:
        with ExitStack() as stack:
            held = [stack.enter_context(socket.socket()) for _ in range(3)]
            held[0].bind(("127.0.0.1", 0))
            held[1].bind(("127.0.0.1", 0))
            second = held[1].getsockname()[1]
            try:
                held[2].bind(("127.0.0.1", second + 1))
            except (OSError, OverflowError):
                continue
            return held[0].getsockname()[1], second, second + 1


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{SBIN}"
