"""Processes on this machine: what each is told, whose lines are whose, and how they end and come back."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch import local
from launch.__main__ import main
from tests.launch_golden import assert_golden
from tests.test_launch import COMMAND, ROOT, job

LAUNCH = [sys.executable, "-m", "launch", "local", "--submit", "--processes", "2"]
AFTER_0 = "until [ -e ready ]; do sleep 0.02; done"
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT)}


def launched(script: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [*LAUNCH, *flags, "--", "bash", "-c", script]
    return subprocess.run(command, cwd=cwd, env=ENVIRON, capture_output=True, text=True, timeout=30)


def test_the_script_is_the_golden_one(capsys):
    words = ["local", "--profile", "rehearsal", "--env", "NOTE=it's $5", "--", *COMMAND]
    assert main(words) == 0
    assert_golden("local.sh", capsys.readouterr().out)


def test_the_printed_script_runs_the_processes(tmp_path):
    show = ("bash", "-c", 'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_NUM_CPU_DEVICES $NOTE"; env >> port')
    text = local.text(job(command=show, env={"NOTE": "it's $5"}), local.Profile(processes=2, devices_per_process=4))
    out = subprocess.run(["bash"], input=text, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert sorted(out.splitlines()) == ["0/2 4 it's $5", "1/2 4 it's $5"]
    ports = re.findall(r"JAX_COORDINATOR_ADDRESS=127\.0\.0\.1:(\d+)\n", (tmp_path / "port").read_text())
    assert len(ports) == 2 and len(set(ports)) == 1 and int(ports[0]) > 1023


def test_every_process_knows_its_place_and_its_lines_carry_its_number(tmp_path):
    done = launched('echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES"; echo e >&2', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[0] 0 of 2", "[0] e", "[1] 1 of 2", "[1] e"]


def test_one_process_is_no_cluster_and_has_no_prefix(tmp_path):
    done = launched('echo "${JAX_PROCESS_ID-none}"', "--processes", "1", cwd=tmp_path)
    assert done.stdout == "none\n"


def test_a_lost_process_ends_the_others_and_all_come_back(tmp_path):
    script = "if [ -e been ]; then echo again; exit 0; fi; [ $JAX_PROCESS_ID = 0 ] || { sleep 0.3; touch been; kill -KILL $$; }; "
    script += "trap 'echo saved; exit 143' TERM; sleep 9 & wait"
    done = launched(script, cwd=tmp_path)
    assert done.returncode == 0 and "launch: ended with 137, starts again: 1 of 10 times" in done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] again", "[0] saved", "[1] again"]


def test_an_error_of_the_training_itself_does_not_come_back(tmp_path):
    done = launched("[ $JAX_PROCESS_ID = 0 ] && exit 2; sleep 9", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")


def test_it_comes_back_only_so_often(tmp_path):
    done = launched("exit 42", "--restarts", "2", cwd=tmp_path)
    assert (
        done.returncode == 42 and done.stderr.count("starts again") == 2 and "came back 2 times: enough" in done.stderr
    )


def test_who_does_not_end_is_killed_after_the_grace(tmp_path):
    script = (
        f"[ $JAX_PROCESS_ID = 1 ] && {{ {AFTER_0}; exit 1; }}; trap '' TERM; touch ready; while :; do sleep 0.1; done"
    )
    done = launched(script, "--grace", "1", "--save-seconds", "1", cwd=tmp_path)
    assert done.returncode == 1 and "launch: killed after 1 s of grace" in done.stderr


def assert_ends_by(number: int, code: int, folder: Path) -> None:
    script = f"trap 'echo told; exit {code}' {number}; touch begun$JAX_PROCESS_ID; while :; do sleep 0.05 & wait; done"
    process = subprocess.Popen(
        [*LAUNCH, "--", "bash", "-c", script], cwd=folder, env=ENVIRON, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 20
    while len(list(folder.glob("begun*"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    assert sorted(process.communicate(timeout=20)[0].splitlines()) == ["[0] told", "[1] told"]
    assert process.returncode == code


def test_sigterm_is_handed_on_and_ends_the_job(tmp_path):
    assert_ends_by(signal.SIGTERM, 143, tmp_path)


def test_ctrl_c_is_handed_on_and_ends_the_job(tmp_path):
    assert_ends_by(signal.SIGINT, 130, tmp_path)


def test_a_studys_runs_come_one_after_the_other_until_one_fails(tmp_path):
    program = tmp_path / "tcjax"
    program.write_text('#!/bin/sh\necho "$*"\n[ "$4" != 2 ]\n')
    program.chmod(0o755)
    command = [*LAUNCH, "--processes", "1", "--runs", "3", "--", str(program), "ablate", "study"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRON, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "ablate study --run 1\nablate study --run 2\n")
    assert done.stderr == "launch: run 1 of 3\nlaunch: run 2 of 3\n"
