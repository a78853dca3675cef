"""The jobs of launch/slurm.py on a real Slurm with two nodes, all of it on this machine (tests/slurm_engine.py).

A training told to stop is requeued and ends with the numbers of one that was left alone; the runs of a study are tasks of
one array whose rows the report gathers; a preempted job saves, a cancelled one stays cancelled.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcjax.study import rows
from tcjax.train.log import read_metrics
from tests.slurm_engine import Engine, engine, lacking
from tests.tiny_boards import make_project

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(bool(lacking()), reason=lacking())]

ROOT = Path(__file__).parents[1]
STUDY = """
from configs import boards

def runs(queries=(16, 4, 1, 64), steps=2):
    return [boards.compressed(f"num_queries/avg_pool-{num}-s0", "avg_pool", num, steps=steps, test=1) for num in queries]
"""
# One device in each process, and the eight fake ones of the tests in none.
FLAGS = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])


@pytest.fixture(scope="module")
def slurm() -> Iterator[Engine]:
    with engine() as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("project"), train=64, test=1)
    shutil.copytree(ROOT / "configs", root / "configs")
    (root / "experiments/num_queries").mkdir(parents=True)
    (root / "experiments/num_queries/study.py").write_text(STUDY)
    return root


def submitted(slurm: Engine, folder: Path, *words: str) -> str:
    """The job's number. words: flags, -- and the command."""
    meet = ["--coordinator-host", "127.0.0.1", "--grace", "20", "--save-seconds", "20", "--env", f"XLA_FLAGS={FLAGS}"]
    command = [sys.executable, "-m", "launch", "slurm", "--submit", *meet, *words]
    environ = slurm.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def log(folder: Path, name: str) -> str:
    path = folder / f"runs/logs/{name}.log"
    return path.read_text() if path.exists() else ""


TCJAX = (sys.executable, "-m", "tcjax.cli")


def test_a_training_on_two_nodes_told_to_stop_is_requeued_and_ends_as_if_nothing_had_happened(slurm, project):
    train = (*TCJAX, "train", "configs/boards.py:pooled", "--train.steps", "40", "--train.log-every", "1")
    whole, stopped = (
        submitted(slurm, project, "--nodes", "2", "--name", name, "--", *train, "--out", f"runs/{name}")
        for name in ("whole", "stopped")
    )

    def losses(name: str) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in read_metrics(project / f"runs/{name}/metrics.jsonl")]

    slurm.wait(lambda: len(losses("stopped")) >= 5, 60, "the training's fifth step")
    slurm("scancel", "--signal=TERM", stopped)
    slurm.hurry(stopped)
    said = log(project, f"stopped-{stopped}")
    assert f"launch: job {stopped} ended with 143 and is requeued, 1 of 10 times" in said, said
    assert 5 <= len(losses("stopped")) < 40
    assert [(slurm.ended(job)["ExitCode"], slurm.job(job)["Restarts"]) for job in (whole, stopped)] == [
        ("0:0", "0"),
        ("0:0", "1"),
    ], log(project, f"stopped-{stopped}")
    assert [step for step, _ in losses("stopped")] == list(range(1, 41))
    assert losses("stopped") == losses("whole")  # bit for bit


def test_a_study_is_one_array_job_whose_rows_the_report_gathers(slurm, project):
    study = (*TCJAX, "ablate", "experiments/num_queries")
    job = submitted(slurm, project, "--study", "--", *study)
    slurm.wait(lambda: not slurm("squeue", "--noheader", f"--jobs={job}"), 120, "the end of the array")
    made, warnings = rows.read(project / "runs/num_queries")
    said = "".join(log(project, f"num-queries-{job}_{number}") for number in range(1, 5))
    assert sorted(row["num_queries"] for row in made) == [1, 4, 16, 64] and not warnings, said
    report = [*TCJAX, "report", "runs/num_queries"]
    subprocess.run(report, cwd=project, env=slurm.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    page = (project / "runs/num_queries/report.html").read_text()
    assert all(f"avg_pool-{num}-s0" in page for num in (1, 4, 16, 64))


# Jobs that only pretend to train: they end with 143 half a second after SIGTERM, and at once when they come back.
PRETEND = "trap 'sleep 0.5; echo saved; exit 143' TERM; echo begun; [ ${SLURM_RESTART_COUNT:-0} -gt 0 ] && exit 0; "
WAIT = "while :; do sleep 0.1; done"


def pretended(slurm: Engine, folder: Path, name: str, script: str, *flags: str) -> str:
    """A job on both nodes whose processes have begun."""
    job = submitted(slurm, folder, "--nodes", "2", "--name", name, *flags, "--", "bash", "-c", PRETEND + script)
    slurm.wait(lambda: log(folder, f"{name}-{job}").count("begun") == 2, 20, f"the beginning of {name}")
    return job


def test_a_preempted_job_saves_within_the_grace_and_comes_back(slurm, tmp_path):
    job = pretended(slurm, tmp_path, "small", WAIT, "--partition", "main")
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    slurm.hurry(job)
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert log(tmp_path, f"small-{job}").count("saved") == 2


def test_a_cancelled_job_and_one_with_an_error_stay_ended_and_one_that_lost_a_process_comes_back(slurm, tmp_path):
    cancelled = pretended(slurm, tmp_path, "cancelled", WAIT)
    wrong = pretended(slurm, tmp_path, "wrong", f"[ $SLURM_PROCID = 1 ] && exit 2; {WAIT}")
    lost = pretended(slurm, tmp_path, "lost", f"[ $SLURM_PROCID = 1 ] && kill -KILL $$; {WAIT}")
    slurm("scancel", cancelled)
    slurm.hurry(lost)
    facts = [slurm.ended(job) for job in (cancelled, wrong, lost)]
    assert [(fact["JobState"], fact["Restarts"]) for fact in facts] == [
        ("CANCELLED", "0"),
        ("FAILED", "0"),
        ("COMPLETED", "1"),
    ]
    assert facts[1]["ExitCode"] == "2:0"
    assert "ended with 137 and is requeued" in log(tmp_path, f"lost-{lost}")


def test_one_run_of_a_study_is_requeued_and_no_other(slurm, tmp_path):
    command = ("bash", "-c", PRETEND + WAIT, "ablate")
    job = submitted(slurm, tmp_path, "--runs", "2", "--name", "study", "--", *command)
    slurm.wait(lambda: all("begun" in log(tmp_path, f"study-{job}_{n}") for n in (1, 2)), 20, "the beginning of both")
    slurm("scancel", "--signal=TERM", f"{job}_2")
    slurm.hurry(f"{job}_2")
    assert slurm.state(f"{job}_1") == "RUNNING"
    facts = slurm.ended(f"{job}_2")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert "saved" not in log(tmp_path, f"study-{job}_1")
    slurm("scancel", job)
