"""SkyPilot task files: golden texts, what a run script does on a node, and what is refused."""

import subprocess
from pathlib import Path

import pytest
import yaml as pyyaml

from launch import __main__ as door
from launch import skypilot
from launch.job import Job, LaunchError
from tests.launch_golden import assert_golden

TRAIN = ("tcjax", "train", "configs/llava.py:pretrain_7b")
JOB = Job(name="LLaVA-7b", command=(*TRAIN, "--mesh.fsdp", "16"))

CASES = {  # name of the golden text: (job, fields of the profile)
    "sky-v6e-16": (
        JOB,
        dict(accelerator="v6e:4x4", infra="gcp", spot=True, mounts={"~/sky_workdir/runs": "gs://our-runs"}),
    ),
    "sky-h100-2x8": (
        Job(name="llava-7b", command=(*TRAIN, "--mesh.data=16"), env={"NCCL_DEBUG": "WARN"}, restarts=3),
        dict(accelerator="h100:2x8", repository="https://github.com/you/tcjax", ref="v1", disk=500),
    ),
    "sky-study": (
        Job(name="q", command=("tcjax", "ablate", "experiments/num_queries"), runs=2),
        dict(accelerator="l4:1"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_file_is_the_golden_text_and_its_scripts_are_read_by_bash(name):
    job, changes = CASES[name]
    text = skypilot.text(job, skypilot.Profile(**changes))
    assert_golden(f"{name}.yaml", text)
    task = pyyaml.safe_load(text)
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True, capture_output=True).stderr == ""


def ran(tmp_path, name, **env):
    """Output and exit code of a golden file's run script, `tcjax` printing what it was given."""
    program = tmp_path / ".venv/bin/tcjax"
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\necho "$@" "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID"; exit 7\n'
    )
    program.chmod(0o755)
    job, changes = CASES[name]
    script = pyyaml.safe_load(skypilot.text(job, skypilot.Profile(**changes)))["run"]
    env = {"PATH": "/usr/bin:/bin"} | env
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    return done.stdout.split(), done.returncode


def test_gpu_nodes_are_numbered_by_skypilot_and_the_first_is_the_coordinator(tmp_path):
    place = dict(SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1")
    words = [*TRAIN[1:], "--mesh.data=16", "10.0.0.1:6002", "2", "1"]
    assert ran(tmp_path, "sky-h100-2x8", **place) == (words, 7)


def test_a_run_of_a_study_is_the_one_its_variable_says(tmp_path):
    assert ran(tmp_path, "sky-study", RUN="2") == (["ablate", "experiments/num_queries", "--run", "2"], 7)


def test_submit_launches_one_managed_job_per_run(tmp_path, monkeypatch):
    program = tmp_path / "sky"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    job, changes = CASES["sky-study"]
    assert skypilot.submit(job, skypilot.Profile(**changes)) == 0
    start = "jobs launch --yes --detach-run --name"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"{start} q-r{k} --env RUN={k} runs/logs/q.sky.yaml" for k in (1, 2)
    ]
    assert Path("runs/logs/q.sky.yaml").read_text() == skypilot.text(job, skypilot.Profile(**changes))


REFUSED = {  # fields of a profile: what is said
    "ironwood": (dict(accelerator="tpu7x:2x2x1"), "on GKE alone"),
    "shape": (
        dict(accelerator="v5p:4x4x32"),
        "SkyPilot asks for v5p-1024, which is another shape; use the route tpu_vm",
    ),
    "ref": (dict(accelerator="h100:8", ref="main"), "needs a repository"),
    "mounts": (dict(accelerator="h100:8", mounts={"~/runs": "bucket"}), "takes a bucket's address"),
    "mesh": (dict(accelerator="h100:8"), "--mesh.fsdp 16 does not divide the 8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(what):
    changes, said = REFUSED[what]
    with pytest.raises(LaunchError, match=said):
        skypilot.text(JOB, skypilot.Profile(**changes))


def test_the_route_prints_the_task_of_a_profile(capsys):
    assert door.main("skypilot --profile sky_v6e --no-spot -- tcjax train configs/boards.py".split()) == 0
    task = pyyaml.safe_load(capsys.readouterr().out)
    assert task["resources"]["accelerators"] == "tpu-v6e-16:1" and task["resources"]["use_spot"] is False
