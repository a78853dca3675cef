"""The shell around a training: SIGTERM reaches it, its exit code comes out, and only the right codes bring it back."""

import signal
import subprocess
import sys
import time

import pytest

from launch import forward
from launch.job import comes_back

# Ends with `code` by itself, or with `told` half a tenth of a second after a SIGTERM; says when it can be told.
CHILD = """
import pathlib, signal, sys, time
code, told, count = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
def stop(*_):
    time.sleep(0.05)
    sys.exit(told)
signal.signal(signal.SIGTERM, stop)
count.write_text((count.read_text() if count.exists() else "") + "x")
time.sleep(60 if code < 0 else 0)
sys.exit(code)
"""


def started(script, tmp_path, code, told=0):
    words = ["bash", "-c", script, "bash", sys.executable, "-c", CHILD, str(code), str(told), str(tmp_path / "count")]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def stopped(script, tmp_path, told, times=1):
    """The exit code of a script whose child was running when SIGTERM came."""
    process, deadline = started(script, tmp_path, -1, told), time.monotonic() + 20
    while not (tmp_path / "count").exists():
        assert time.monotonic() < deadline, "the child never began"
        time.sleep(0.01)
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.communicate(timeout=20)
    return process.returncode


@pytest.mark.parametrize("code", [0, 1, 42, 143])
def test_the_exit_code_of_a_command_comes_out(tmp_path, code):
    process = started(forward.SCRIPT, tmp_path, code)
    process.communicate(timeout=20)
    assert process.returncode == code


@pytest.mark.parametrize("told", [0, 1, 143])
def test_sigterm_reaches_the_command_and_its_own_code_comes_out(tmp_path, told):
    assert stopped(forward.SCRIPT, tmp_path, told) == told


def test_a_second_sigterm_does_not_cut_the_save_short(tmp_path):
    assert stopped(forward.SCRIPT, tmp_path, 17, times=2) == 17


def test_a_command_that_does_not_exist_is_127(tmp_path):
    process = subprocess.run(["bash", "-c", forward.SCRIPT, "bash", "no-such-program"], capture_output=True)
    assert process.returncode == 127


@pytest.mark.parametrize("code, begun", [(42, 3), (143, 3), (0, 1), (1, 1), (2, 1), (130, 1)])
def test_a_supervised_command_comes_back_on_the_restart_codes_alone(tmp_path, code, begun):
    process = started(forward.supervised(restarts=2, pause=0), tmp_path, code)
    process.communicate(timeout=20)
    assert (process.returncode, (tmp_path / "count").read_text()) == (code, "x" * begun)


def test_a_supervisor_told_to_stop_does_not_begin_again(tmp_path):
    assert stopped(forward.supervised(restarts=2, pause=0), tmp_path, 143) == 143
    assert (tmp_path / "count").read_text() == "x"


def test_the_shell_reads_the_restart_codes_of_the_contract():
    patterns = forward.supervised(restarts=1).partition('case "$code" in ')[2].partition(")")[0]
    script = f'for code in {{0..255}}; do case "$code" in {patterns}) echo "$code" ;; esac; done'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in said.split()] == [code for code in range(256) if comes_back(code)]
