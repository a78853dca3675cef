"""Processes on this machine, restarted as a cluster would: a rehearsal of a job, or a training on one host's GPUs.

Each process gets the trio JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID. The lines they print are prefixed by
the process's number. The first process that fails ends the others: SIGTERM, and SIGKILL after the grace; its code decides
whether all of them come back. Ctrl-C and SIGTERM are handed on and end the job. A study's runs come one after the other.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from launch.job import Job, LaunchError, comes_back

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HOST = "127.0.0.1"
FREE_PORT = f"$(python3 -c 'import socket; s = socket.create_server((\"{HOST}\", 0)); print(s.getsockname()[1])')"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """This machine. processes: of one job. devices_per_process: fake CPU devices each of them shows; 0 takes what is there."""

    processes: int = 1
    devices_per_process: int = 0

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("devices_per_process", 0)):
            if getattr(self, name) < least:
                raise LaunchError(f"local: {name} {getattr(self, name)} is below {least}.")


FLAGS = {"--processes": "processes", "--devices-per-process": "devices_per_process"}


def text(job: Job, profile: Profile) -> str:
    """The commands as a script; --submit does more: it prefixes the lines, ends what is left over and restarts."""
    lines = ["#!/bin/bash"]
    for command in _commands(job):
        if profile.processes > 1:
            lines.append(f"port={FREE_PORT}")
        for rank in range(profile.processes):
            facts = _environment(job, profile, rank, "$port")
            shown = [f"{name}={shlex.quote(value)}" for name, value in facts.items()]
            shown = [word.replace(f"'{HOST}:$port'", f'"{HOST}:$port"') for word in shown]
            lines.append(" ".join([*shown, shlex.join(command)]) + (" &" if profile.processes > 1 else ""))
        if profile.processes > 1:
            lines.append("wait")
    return "\n".join(lines) + "\n"


def submit(job: Job, profile: Profile) -> int:
    """Run it here, in the foreground; the code of the first run that fails, else 0."""
    told = _Told()
    with told:
        for number, command in enumerate(_commands(job), 1):
            if job.runs:
                _say(f"run {number} of {job.runs}")
            code = _run(job, profile, command, told)
            if code:
                return code
    return 0


class _Told:
    """The signals this process was sent, while the context lasts."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self._hear) for number in FORWARDED}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: object) -> None:
        self.numbers.append(number)


def _run(job: Job, profile: Profile, command: Sequence[str], told: _Told) -> int:
    """One command until it ends for good."""
    for restart in range(job.restarts + 1):
        code = _once(job, profile, command, told)
        if not comes_back(code) or told.numbers:
            return code
        if restart < job.restarts:
            _say(f"ended with {code}, starts again: {restart + 1} of {job.restarts} times")
    _say(f"ended with {code} and came back {job.restarts} times: enough")
    return code


def _once(job: Job, profile: Profile, command: Sequence[str], told: _Told) -> int:
    """All processes, once; the code of the first that failed, 128 + n for one ended by signal n."""
    port, ranks, readers = str(_free_port()), [], []
    try:
        for rank in range(profile.processes):
            process = subprocess.Popen(
                list(command),
                env=os.environ | _environment(job, profile, rank, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes by us alone, and once
            )
            prefix = f"[{rank}] " if profile.processes > 1 else ""
            assert process.stdout is not None
            readers.append(threading.Thread(target=_copy, args=(process.stdout, prefix), daemon=True))
            readers[-1].start()
            ranks.append(process)
        return _watch(ranks, job.grace, told)
    except OSError as error:
        raise LaunchError(f"{command[0]} does not start: {error.strerror}.") from None
    finally:
        _end(ranks, signal.SIGKILL)
        for process in ranks:
            process.wait()
        for reader in readers:
            reader.join(timeout=5)


def _watch(ranks: Sequence[subprocess.Popen], grace: float, told: _Told) -> int:
    """Wait for all; hand signals on; after the first failure or signal the others have `grace` seconds left."""
    first, handed, deadline = 0, 0, math.inf
    while True:
        running = [process for process in ranks if process.poll() is None]
        failed = [128 - code if code < 0 else code for process in ranks if (code := process.returncode)]
        numbers, handed = told.numbers[handed:], len(told.numbers)
        if failed and not first:
            first, numbers = failed[0], [signal.SIGTERM, *numbers]
        if not running:
            return first
        for number in numbers:
            again = deadline < math.inf and number == signal.SIGINT  # a second Ctrl-C is in earnest
            _end(running, signal.SIGKILL if again else number)
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            _say(f"killed after {grace} s of grace")
            _end(running, signal.SIGKILL)
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen], number: int) -> None:
    """A signal to every process; SIGKILL to all that they have started too."""
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)


def _copy(lines: IO[str], prefix: str) -> None:
    for line in lines:
        sys.stdout.write(prefix + line)
        sys.stdout.flush()


def _commands(job: Job) -> list[list[str]]:
    return [[*job.command, "--run", str(number)] for number in range(1, job.runs + 1)] or [list(job.command)]


def _environment(job: Job, profile: Profile, rank: int, port: str) -> dict[str, str]:
    facts = dict(job.env)
    if profile.devices_per_process:
        facts |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(profile.devices_per_process)}
    if profile.processes > 1:
        facts["JAX_COORDINATOR_ADDRESS"] = f"{HOST}:{port}"
        facts |= {"JAX_NUM_PROCESSES": str(profile.processes), "JAX_PROCESS_ID": str(rank)}
    return facts


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
