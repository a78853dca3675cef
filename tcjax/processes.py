"""One training in several processes: how they find each other, stop together and end.

    join()          before anything touches a device: this process's place (tcjax/clusters.py) checked, the others joined
    stop_signals()  around a training: SIGTERM or Ctrl-C to one process is the same step's stop for all
    end(code)       behind an error: this process leaves at once, without waiting for processes that cannot come

A process that dies (SIGKILL, a lost machine) is missed after TCJAX_HEARTBEAT_SECONDS (30): jax then aborts the others with
SIGABRT, exit code 134. A lost coordinator, which lives in process 0, is noticed at once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tcjax.clusters import find, line, number

HEARTBEAT = "TCJAX_HEARTBEAT_SECONDS"  # without a sign of life, after which a process counts as lost
JOIN = "TCJAX_JOIN_SECONDS"  # a process waits for the coordinator, and the coordinator for the processes
DEFAULTS = {HEARTBEAT: 30, JOIN: 300}


def join(coordinator: str = "", processes: int = 0, process: int = -1, *, quiet: bool = False) -> None:
    """Join the other processes, if there are any; the second call in a process does nothing.

    Args:
        coordinator, processes, process: "host:port", how many, which one (from 0); left out, the environment says.
        quiet: process 0 does not say what was found.

    Raises:
        ValueError: half of a place is given, a count or number is impossible, or the coordinator does not answer.
    """
    group = find(os.environ, coordinator, processes, process)
    if group is not None and group.processes == 1:
        return

    import jax

    if jax.distributed.is_initialized() or (group is None and not _on_tpu_vm()):
        return
    wait = _seconds(JOIN)
    jax.config.update("jax_enable_preemption_service", True)
    limits: dict[str, Any] = {
        "initialization_timeout": wait,
        "heartbeat_timeout_seconds": _seconds(HEARTBEAT),
    }
    if group is None:
        try:
            jax.distributed.initialize(**limits)
        except Exception as error:
            raise ValueError(
                f"this is a Cloud TPU machine that does not say which of how many it is ({error}); say --coordinator "
                "HOST:PORT --processes N --process I, or set TPU_SKIP_MDS_QUERY=1 for one process."
            ) from error
    else:
        if group.process == 0 and not quiet:
            print(f"{line(group)}; waiting for the others for up to {wait} s", file=sys.stderr, flush=True)
        if group.process > 0:
            _await(group.coordinator, wait)
        jax.distributed.initialize(
            group.coordinator,
            group.processes,
            group.process,
            None if group.devices is None else list(group.devices),
            cluster_detection_method="deactivate",  # `find` has done it
            **limits,
        )
    _notifier()


def describe() -> str:
    """Which process this is and what said so, in one line, without joining."""
    group = find(os.environ)
    return "one process" if group is None else line(group)


def several() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    import jax

    return jax.process_index() == 0


def _on_tpu_vm() -> bool:
    """Whether jax has found TPU chips and may ask the machine about its neighbours: it says so in the environment."""
    return os.environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in os.environ


def _await(coordinator: str, seconds: int) -> None:
    """Until the coordinator's port answers: jax itself would end this process by an abort and a trace of its own stack."""
    host, _, port = coordinator.rpartition(":")
    begun, last = time.monotonic(), "no answer"
    while True:
        left = begun + seconds - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(min(left, 5), 0.1)).close()
            return
        except OSError as error:
            last = str(error)
        if left <= 1:
            raise ValueError(
                f"the coordinator {coordinator} did not answer for {seconds} s ({last}): process 0 must run on that host, "
                f"and the port be open between the hosts. {JOIN} says how long to wait."
            )
        time.sleep(min(1, left))


def _seconds(name: str) -> int:
    seconds = number(os.environ, name) if os.environ.get(name) else DEFAULTS[name]
    if seconds < 1:
        raise ValueError(f"{name}={seconds}: takes whole seconds from 1 up.")
    return seconds


# Stopping ------------------------------------------------------------------------------------------------------------

_asked = 0  # how often `stop_signals` was asked by this process: alike in all, whatever was trained before


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and Ctrl-C are only noted. Ask the yielded function once per step: the signal to stop for, or 0.

    Of several processes all get the answer at the same step, whichever of them was told. There jax notes SIGTERM by a
    handler of its own in C, tells the others and agrees on a step; Python's would keep it from knowing. So it is in place
    inside only: outside, where there is nothing to save, SIGTERM ends the process as it does everywhere. Ctrl-C is passed
    on to jax as SIGTERM.
    """
    import jax

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    several, noted = jax.distributed.is_initialized(), []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    if several:
        _libc_signal()(signal.SIGTERM, _notifier())
    try:
        yield functools.partial(_agreed, noted) if several else lambda: noted[0] if noted else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if several:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _agreed(noted: list[int]) -> int:
    from jax.experimental import multihost_utils

    global _asked
    _asked += 1
    if not multihost_utils.reached_preemption_sync_point(_asked):
        return 0
    return noted[0] if noted else signal.SIGTERM


@functools.cache
def _notifier() -> int:
    """jax's handler of SIGTERM, which a thread of its own puts in place soon after joining; the default is in place again."""
    handle, until = _libc_signal(), time.monotonic() + 10
    while time.monotonic() < until:
        found = handle(signal.SIGTERM, None)  # None: SIG_DFL
        if found:
            return found
        time.sleep(0.01)
    raise RuntimeError("jax has installed no handler of SIGTERM; is jax_enable_preemption_service switched off?")


@functools.cache
def _libc_signal() -> Callable[[int, int | None], int | None]:
    function = ctypes.CDLL(None).signal
    function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return function


# Ending --------------------------------------------------------------------------------------------------------------


def end(code: int, error: BaseException | None = None) -> int:
    """The exit code after an error; of several processes, this one leaves at once instead of returning.

    Leaving the usual way would wait minutes for processes that wait for this one. What looks like an error here may be the
    first sign of a lost process: then jax ends this one meanwhile, with a code that launchers restart on. Process 0 holds
    the coordinator and leaves last, so that others with the same error can say it themselves.
    """
    if not several():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if error is not None and _may_be_a_loss(error):
        time.sleep(_seconds(HEARTBEAT) + 5)
    if is_first():
        time.sleep(3)
    os._exit(code)


def _may_be_a_loss(error: BaseException | None) -> bool:
    """Whether jax, or a wait for others, stands behind an error."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError | TimeoutError) or "Timeout" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False
