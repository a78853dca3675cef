"""Several processes are one training: same losses, one agreed stop, no wait for the dead, any number of them goes on."""

import dataclasses
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

from tcjax import job, processes
from tcjax.cli import main
from tcjax.config import Source
from tcjax.export.artifact import load_artifact
from tcjax.study import rows
from tcjax.train.goodput import FILE, summary
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
    """Four processes, one told to stop; two, one killed; one finishes. All in one folder."""
    found: dict = {"stopped": trained(project, 4, "term 3 2"), "stopped at": newest(project)}
    found |= {"killed": trained(project, 2, "kill 1 4"), "ended": time.time(), "left at": newest(project)}
    found["kill"] = json.loads((project / "kill").read_text())
    found["outcome"] = job.train_run(group.a_run(8), root=project, out=project / "out", quiet=True)
    return found


def newest(project: Path) -> int:
    return max(int(path.name) for path in (project / "out/checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_the_losses_are_those_of_one_process_through_every_stop_and_resume(project, story, uninterrupted):
    """Four, two and one process, with other meshes: every step sees the same global batch."""
    lines = read_metrics(project / "out/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, group.STEPS + 1))
    for key in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(
            [line[key] for line in lines], [line[key] for line in uninterrupted], rtol=1e-5, atol=1e-6, err_msg=key
        )
    assert story["outcome"].steps == group.STEPS


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_saved_step(story):
    assert [code for code, _ in story["stopped"]] == [143] * 4, story["stopped"]
    said = re.findall(r"signal 15; step (\d+) of \d+ is saved, run again to resume", story["stopped"][0][1])
    assert said == [str(story["stopped at"])] and 2 <= story["stopped at"] < group.STEPS


@pytest.mark.slow
def test_only_the_first_process_speaks(story):
    for _, text in story["stopped"][1:] + story["killed"][1:]:
        assert "group/run" not in text
    assert f"resumed at step {story['stopped at']} of {group.STEPS}" in story["killed"][0][1]


@pytest.mark.slow
def test_another_frozen_model_is_refused_by_name_in_every_process(story):
    for _, text in story["killed"]:
        assert re.search(r"REFUSED checkpoint .* belongs to another run:\n +model\.llm\.layers: 2 there, 1 here", text)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_in_time_with_a_code_to_restart_on(story):
    (survivor, text), (killed, _) = story["killed"]
    assert (survivor, killed) == (-signal.SIGABRT, -signal.SIGKILL), text  # 134 and 137 in a shell
    assert story["ended"] - story["kill"]["at"] < LIMIT
    assert story["stopped at"] <= story["left at"] < story["kill"]["done"]


@pytest.mark.slow
def test_the_goodput_log_adds_up_over_a_stop_and_a_kill(project, story):
    found = summary(project / "out")
    steps = found["seconds"]
    assert found["processes"] == 3 and None not in found["first_steps"]
    assert found["lost_steps"] == story["kill"]["done"] - story["left at"] > 0
    assert steps["lost"] > 0.2 * found["lost_steps"]  # a quarter of a second each, at least
    assert steps["down"] > HEARTBEAT / 2 and min(steps[kind] for kind in ("init", "compile", "restore", "save")) > 0
    lines = [json.loads(line) for line in (project / "out" / FILE).read_text().splitlines()]
    np.testing.assert_allclose(found["wall"], lines[-1]["at"] - lines[0]["began"], atol=1e-3)
    assert found["goodput"] == steps["step"] / found["wall"]


# A study ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studies(project) -> tuple[Path, Path, list[tuple[int, str]]]:
    """Of one process and of two, and what the two said."""
    folder = project / "experiments/tiny"
    folder.mkdir(parents=True)
    (project / "configs").mkdir()
    # Weights in shares over the processes, and no float64 rounding between eight devices and two.
    text = STUDY.replace("evaluate=", "mesh=MeshConfig(data=-1, fsdp=2), evaluate=").replace(
        "import Data", "import MeshConfig, Data"
    )
    (folder / "study.py").write_text(text)
    command = ["ablate", str(folder), "--compressors", "resampler", "--out"]
    assert main([*command, str(project / "alone"), "--quiet"]) == 0
    shutil.rmtree(project / "runs/features")
    port, flags = free_port(), ["--processes", "2", "--process"]
    pair = [
        start(["tcjax.cli", *command, str(project / "pair"), "--coordinator", f"localhost:{port}", *flags, str(number)])
        for number in range(2)
    ]
    return project / "alone", project / "pair", finished(pair)


@pytest.mark.slow
def test_a_study_of_two_processes_has_the_rows_and_the_artifact_of_one(studies):
    alone, pair, said = studies
    assert [code for code, _ in said] == [0, 0], said
    (expected,), (found,) = rows.read(alone)[0], rows.read(pair)[0]
    assert len((pair / rows.FILE).read_text().splitlines()) == 1
    for key in ("run", "fingerprint", "steps", "visual_tokens", "prefill_flops", "artifact", "corrupt_images"):
        assert found[key] == expected[key], key
    for key in ("accuracy", "token_accuracy", "controls", "mean_accuracy"):
        assert found[key] == expected[key], key
    place = expected["run"]
    answers = [(study / place / "answers.jsonl").read_text() for study in (alone, pair)]
    assert answers[0] == answers[1]
    weights = [load_artifact(study / place / "artifact").arrays for study in (alone, pair)]
    for path, array in weights[0].items():
        np.testing.assert_allclose(weights[1][path], array, atol=1e-5, err_msg=path)
    looks = [np.load(study / place / "looks.npz")["assign"] for study in (alone, pair)]
    np.testing.assert_allclose(*looks, atol=1e-5)


@pytest.mark.slow
def test_the_second_process_of_a_study_says_nothing(studies):
    _, pair, said = studies
    assert str(pair) in said[0][1].splitlines()
    assert all("Gloo" in line or not line for line in said[1][1].splitlines()), said[1][1]


# Joining ------------------------------------------------------------------------------------------------------------


def test_a_coordinator_that_does_not_answer_is_said_in_one_line(project, capsys, monkeypatch):
    monkeypatch.setenv(processes.JOIN, "1")
    port = free_port()
    flags = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", "1"]
    assert main(["train", str(ROOT / "configs/boards.py"), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"the coordinator localhost:{port} did not answer for 1 s" in said and "TCJAX_JOIN_SECONDS" in said


def test_a_missing_dataset_is_said_before_weights_are_loaded(project, monkeypatch):
    run = group.a_run(8)
    missing = dataclasses.replace(run.data, sources=(Source(path="data/nowhere"),))
    monkeypatch.setattr(job, "_assembled", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="nowhere"):
        job.train_run(run.replace(data=missing), root=project, out=project / "none", quiet=True)
