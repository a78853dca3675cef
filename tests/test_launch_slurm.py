"""The sbatch script: its text, and what it decides when its step ends, with programs that only pretend to be Slurm's.

tests/test_slurm_rehearsal.py runs the same script on a real Slurm.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.__main__ import main
from launch.job import LaunchError
from tests.test_launch import job

GOLDEN = Path(__file__).parent / "golden/launch"
SCRIPTS = {
    "slurm_two_nodes.sh": "slurm --nodes 2 --partition cpu --time 1:00:00 -- tcjax train configs/boards.py",
    "slurm_gpu.sh": "slurm --profile slurm_gpu --account vision -- tcjax train configs/llava.py:pretrain_7b",
    "slurm_study.sh": "slurm --profile slurm_gpus_apart --runs 7 --grace 300 --save-seconds 200 --restarts 3 "
    "--env XLA_FLAGS='--xla_a --xla_b' -- tcjax ablate experiments/num_queries --queries 64,16,4",
}
MADE_BY = "made by `python -m launch {}`: write it anew if the difference is meant"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_the_golden_one(name, capsys):
    assert main(shlex.split(SCRIPTS[name])) == 0
    assert capsys.readouterr().out == (GOLDEN / name).read_text(), MADE_BY.format(SCRIPTS[name])


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_script(name):
    done = subprocess.run(["bash", "-n", GOLDEN / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_option_that_is_none_is_refused():
    with pytest.raises(LaunchError, match=r"options \['mail'\]: each is one sbatch option"):
        slurm.Profile(options=("mail",))


# What the script does ------------------------------------------------------------------------------------------------

# Each writes down how it was called; srun runs its task once, with a rank's number.
PROGRAMS = {
    "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_PROCID=0 "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo n1; echo n2; fi',
    "squeue": 'echo "$STATE"',
    "scancel": 'kill -TERM "$(cat task)"',
    "sbatch": "cat > sent",
}


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A folder that is the current one, with the pretended programs first on the PATH; they write down their calls."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "runs/logs").mkdir(parents=True)
    for name, body in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> calls\n{body}\n')
        path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name, value in {"SLURM_JOB_ID": "4097", "SLURM_JOB_NODELIST": "n[1-2]", "STATE": "RUNNING"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def ran(*command: str, restarts: int = 10, runs: int = 0, **facts) -> subprocess.CompletedProcess:
    script = slurm.text(job(command=command, restarts=restarts, runs=runs), slurm.Profile(nodes=2, **facts))
    return subprocess.run(["bash"], input=script, capture_output=True, text=True, timeout=20)


def requeued(folder: Path) -> list[str]:
    return [line for line in (folder / "calls").read_text().splitlines() if line.startswith("scontrol requeue")]


@pytest.mark.parametrize("code, again", [(0, 0), (1, 0), (2, 0), (42, 1), (130, 0), (134, 1), (143, 1)])
def test_the_exit_code_decides_whether_the_job_comes_back(pretended, code, again):
    assert ran("sh", "-c", f"exit {code}").returncode == code
    assert requeued(pretended) == ["scontrol requeue 4097"] * again
    assert not list(pretended.glob("runs/logs/*.codes"))


def test_the_first_process_that_failed_decides_not_those_that_were_killed_for_it(pretended):
    (pretended / "bin/srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != rank ]; do shift; done\nprintf "2\\n137\\n" > "$codes"; exit 137\n'
    )
    assert ran("ignored").returncode == 2
    assert requeued(pretended) == []


def test_enough_is_enough(pretended, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert "came back 3 times: enough" in ran("sh", "-c", "exit 143", restarts=3).stderr
    assert requeued(pretended) == []
    assert "requeued, 4 of 4 times" in ran("sh", "-c", "exit 143", restarts=4).stderr
    assert len(requeued(pretended)) == 1


def test_a_cancelled_job_stays_cancelled(pretended, monkeypatch):
    monkeypatch.setenv("STATE", "COMPLETING")
    assert "ended with 143 and is COMPLETING" in ran("sh", "-c", "exit 143").stderr
    assert requeued(pretended) == []


def test_a_run_of_a_study_is_requeued_by_itself(pretended, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4096")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    done = ran("sh", "-c", 'echo "$0 $*"; exit 42', "tcjax", "ablate", "a study", runs=4)
    assert "tcjax ablate a study --run 3" in done.stdout
    assert requeued(pretended) == ["scontrol requeue 4096_3"]


def test_words_with_spaces_quotes_and_dollars_arrive_as_they_are(pretended):
    words = ["a b", "it's", '"$HOME"', "*", "$(id)", "a\nb", ""]
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", *words]
    assert ran(*command).stdout == f"{words}\n"


def test_the_processes_meet_on_the_jobs_first_host_at_a_port_of_the_job(pretended):
    show = ("sh", "-c", "echo $JAX_COORDINATOR_ADDRESS")
    assert ran(*show).stdout == "n1:61441\n"
    assert ran(*show, coordinator_host="10.0.0.7").stdout == "10.0.0.7:61441\n"


def test_sigterm_to_the_script_reaches_the_step_which_ends_in_its_own_time(pretended):
    task = "echo $$ > task; trap 'sleep 0.2; echo saved; exit 143' TERM; kill -TERM $PPID_OF_SCRIPT; sleep 9 & wait"
    script = slurm.text(job(command=("bash", "-c", task)), slurm.Profile())
    script = script.replace("stopped=\n", "stopped=\nexport PPID_OF_SCRIPT=$$\n", 1)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (143, "saved\n")
    assert requeued(pretended) == ["scontrol requeue 4097"]


def test_sigterm_before_the_step_begins_requeues_at_once(pretended):
    assert ran("echo", "begun", setup=("kill -TERM $$",)).returncode == 143
    assert requeued(pretended) == ["scontrol requeue 4097"]
    assert "srun" not in (pretended / "calls").read_text()


def test_submitting_makes_the_folder_of_the_logs_and_sends_the_script(pretended):
    (pretended / "runs/logs").rmdir()
    assert main(["slurm", "--submit", "--", "tcjax", "train", "configs/boards.py"]) == 0
    assert (pretended / "runs/logs").is_dir()
    assert (pretended / "sent").read_text() == slurm.text(job(), slurm.Profile())
