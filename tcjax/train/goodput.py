"""Where the time of a training went, across kills and restarts: goodput.jsonl in the run's folder, and its summary.

    goodput = step / wall        wall = init + compile + restore + data + step + save + lost + down

Seconds, by what they were spent on, of process 0:

| init | from the start of the process (where `tcjax train` is it) to the first batch, restoring left out |
| compile | tracing and compiling the step, for every shape of batch; loading it from a compilation cache |
| restore | reading the newest checkpoint |
| data | waiting for the next batch |
| step | everything else in the loop: the steps themselves, and reading and logging their figures |
| save | the part of saving that steps wait for: copying off the devices, and what is left of the save before |
| lost | step and data of steps that a later process did again, because no checkpoint had them |
| down | from the last sign of a process that was killed, or stopped to be restarted, to the start of the next |

Beside them, not in the sum: background, the part of saving that goes on while steps are done. A training that ended, or
was stopped by Ctrl-C, has no down: nobody was waiting.

Format: a line {"at": Unix time, "event": "start" | "first" | "progress" | "end", "step": n, "seconds": {kind: seconds
since the line before}}. "start" has the step it resumed at and when the process began, "first" says that its first step is
done, "end" has the exit code. At most one line a second follows, so what is known of a killed process is off by a second.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "goodput.jsonl"
KINDS = ("init", "compile", "restore", "data", "step", "save", "lost", "down")
_REDONE = ("data", "step")  # spent on a step; lost if the step is
_EVERY = 1.0  # seconds between two lines
_WANTED_BACK = (None, 143)  # exit codes behind which somebody waits for the next process; None: it was killed


class Goodput:
    """Writes the log of one process. `spend(kind)` says what the time since the last call was."""

    def __init__(self, path: Path | None, *, began: float | None = None, clock: Callable[[], float] = time.time):
        """path: None writes nothing. began: Unix time at which the process, or its training, started."""
        self._clock, self._path, self._file = clock, path, None
        self._mark = self._began = clock() if began is None else began
        self._seconds: dict[str, float] = {}
        self._written, self._step = self._mark, 0

    def start(self, step: int) -> None:
        """The loop begins, behind `step`; what was not restoring until now was init."""
        self.spend("init")
        self._step = step
        if self._path is not None:
            torn = self._path.exists() and not self._path.read_bytes().endswith(
                b"\n"
            )  # by the kill of an earlier process
            self._file = self._path.open("a", buffering=1)
            self._file.write("\n" if torn and self._path.stat().st_size else "")
            self._write("start", began=self._began)

    def spend(self, kind: str) -> None:
        now = self._clock()
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._mark
        self._mark = now

    def background(self, seconds: float) -> None:
        """A save went on for so long beside the steps."""
        self._seconds["background"] = self._seconds.get("background", 0.0) + seconds

    def first(self, step: int) -> None:
        """The process's first step is done, its figures read."""
        self.spend("step")
        self._step = step
        self._write("first")

    def stepped(self, step: int) -> None:
        """A step is behind us."""
        self.spend("step")
        self._step = step
        if self._mark - self._written >= _EVERY:
            self._write("progress")

    def end(self, code: int) -> None:
        self.spend("step")
        self._write("end", code=code)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: str, **facts: Any) -> None:
        if self._file is not None:
            seconds = {kind: round(spent, 6) for kind, spent in self._seconds.items()}
            line = {"at": round(self._mark, 6), "event": event, "step": self._step, **facts, "seconds": seconds}
            self._file.write(json.dumps(line) + "\n")
        self._written, self._seconds = self._mark, {}


def summary(path: Path) -> dict[str, Any]:
    """What a goodput.jsonl, or the run's folder that holds it, adds up to.

    Returns:
        goodput (share), wall (seconds), seconds {kind: seconds}, background (seconds), processes, lost_steps, and
        first_steps: per process the seconds from its start to the end of its first step, None if it did not get there.

    Raises:
        ValueError: there is no such log.
    """
    path = path / FILE if path.is_dir() else path
    lines = _read(path)
    if not lines:
        raise ValueError(f"{path} holds no goodput log; `tcjax train` writes one into the run's folder.")
    seconds: dict[str, float] = dict.fromkeys((*KINDS, "background"), 0.0)
    spans: list[tuple[int, int, dict[str, float]]] = []  # from step, to step, seconds of those steps
    lost_steps, first_steps, began, last = 0, [], 0.0, None
    for line in lines:
        if line["event"] == "start":
            if last is not None:
                if last.get("code") in _WANTED_BACK:
                    seconds["down"] += max(line["began"] - last["at"], 0.0)
                lost_steps += max(last["step"] - line["step"], 0)
                spans = _losing(spans, line["step"], seconds)
            began = line["began"]
            first_steps.append(None)
        else:
            assert last is not None  # `_read` begins with a start
            spans.append((last["step"], line["step"], line["seconds"]))
            if line["event"] == "first":
                first_steps[-1] = line["at"] - began
        for kind, spent in line["seconds"].items():
            seconds[kind] += spent
        last = line
    background = seconds.pop("background")
    wall = sum(seconds.values())
    return {
        "goodput": seconds["step"] / wall if wall else 0.0,
        "wall": wall,
        "seconds": seconds,
        "background": background,
        "processes": len(first_steps),
        "lost_steps": lost_steps,
        "first_steps": first_steps,
    }


def told(found: dict[str, Any]) -> str:
    """A summary in one line."""
    lost = f"lost ({found['lost_steps']} steps)" if found["lost_steps"] else "lost"
    parts = [
        f"{lost if kind == 'lost' else kind} {spent:.1f}" for kind, spent in found["seconds"].items() if spent >= 0.05
    ]
    processes = f", {found['processes']} processes" if found["processes"] > 1 else ""
    return f"goodput {found['goodput']:.1%} of {found['wall']:.1f} s{processes}: {', '.join(parts)} s"


def _losing(spans: list, step: int, seconds: dict[str, float]) -> list:
    """Moves what was spent on steps behind `step` to "lost"; what is left of the spans."""
    kept = []
    for start, stop, spent in spans:
        share = (stop - max(start, step)) / (stop - start) if stop > max(start, step) else 0.0
        for kind in _REDONE:
            moved = share * spent.get(kind, 0.0)
            seconds[kind] -= moved
            seconds["lost"] += moved
        if start < step:
            kept.append((start, min(stop, step), {kind: (1 - share) * spent.get(kind, 0.0) for kind in _REDONE}))
    return kept


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines from the first start on; one cut short by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if lines or line["event"] == "start":
            lines.append(line)
    return lines


def process_start() -> float:
    """Unix time at which this process started; where the system does not say, now."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError, ValueError):
        return time.time()
