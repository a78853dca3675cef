"""Several processes are one training: same losses, one agreed stop, no wait for the dead, any number of them goes on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tcjax import clusters, job, processes
from tcjax.cli import main
from tcjax.study import rows
from tcjax.train.goodput import summary
from tcjax.train.log import read_metrics
from tests import group
from tests.test_study import STUDY
from tests.tiny_boards import make_project

ROOT = Path(__file__).parents[1]
HEARTBEAT = 6
LIMIT = 2 * HEARTBEAT + 5  # seconds after a kill within which nobody is left


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def start(command: list[str], devices: int = 1, **environment: str) -> subprocess.Popen:
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    own = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), processes.HEARTBEAT: str(HEARTBEAT), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    said = [process.communicate(timeout=240)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def trained(project: Path, count: int, accident: str) -> list[tuple[int, str]]:
    port = free_port()
    command = ["tests.group", str(project), port, str(count)]
    return finished([start([*command, str(number), accident], 4 // count) for number in range(count)])


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def uninterrupted(project) -> list[dict]:
    """One process, eight devices."""
    job.train_run(group.a_run(8), root=project, out=project / "whole", quiet=True)
    return read_metrics(project / "whole/metrics.jsonl")


@pytest.fixture(scope="module")
def story(project) -> dict:
    """Four processes, one told to stop; two, one told to stop; two, one killed; one finishes. All in one folder."""
    found: dict = {"four": trained(project, 4, "term 3 2")}
    found["stopped at"] = [newest(project)]
    found["two"] = trained(project, 2, "other term 0 2")
    found["stopped at"].append(newest(project))
    found["killed"] = trained(project, 2, "kill 1 5")
    found["gone after"] = time.time() - float((project / "kill.time").read_text())
    found["left at"] = newest(project)
    outcome = job.train_run(group.a_run(8), root=project, out=project / "out", quiet=True)
    return found | {"outcome": outcome}


def newest(project: Path) -> int:
    return max(int(path.name) for path in (project / "out/checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_the_losses_are_those_of_one_process_through_every_stop_and_resume(project, story, uninterrupted):
    """Four, two, two and one process, with other meshes: every step sees the same global batch."""
    lines = read_metrics(project / "out/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, group.STEPS + 1))
    for key in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(
            [line[key] for line in lines], [line[key] for line in uninterrupted], rtol=1e-5, atol=1e-6, err_msg=key
        )
    assert story["outcome"].steps == group.STEPS


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_saved_step(story):
    for processes_of in ("four", "two"):
        assert [code for code, _ in story[processes_of]] == [143] * len(story[processes_of]), story[processes_of]
    for number, processes_of in enumerate(("four", "two")):
        said = re.findall(r"signal 15; step (\d+) of 22 is saved, run again to resume", story[processes_of][0][1])
        assert said == [str(story["stopped at"][number])]
    first, second = story["stopped at"]
    assert 2 <= first < second < group.STEPS


@pytest.mark.slow
def test_only_the_first_process_speaks(story):
    for _, text in story["four"][1:] + story["two"][1:]:
        assert "group/run" not in text.replace("REFUSED", ""), text
    assert "resumed at step" in story["two"][0][1]


@pytest.mark.slow
def test_another_frozen_model_is_refused_by_name_in_every_process(story):
    for _, text in story["two"]:
        assert re.search(r"REFUSED checkpoint .* belongs to another run:\n +model\.llm\.layers: 2 there, 1 here", text)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_in_time_with_a_code_to_restart_on(project, story):
    (survivor, text), (killed, _) = story["killed"]
    assert killed == -signal.SIGKILL
    assert survivor == -signal.SIGABRT, text  # 134 in a shell
    assert story["gone after"] < LIMIT
    assert story["left at"] >= story["stopped at"][1]
