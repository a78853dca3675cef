"""The door of launch/: what it refuses, what it prints, and that it needs nothing but Python."""

import ast
import dataclasses
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import ROUTES, main, name_of
from launch.job import PROFILES, Job, LaunchError, comes_back, described, known, load_profile, study_runs

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "launch").glob("*.py"))
BUILT = [route for route in ROUTES if (ROOT / f"launch/{route}.py").is_file()]
COMMAND = ("tcjax", "train", "configs/boards.py")


def job(**changes) -> Job:
    return Job(**{"name": "boards", "command": COMMAND, **changes})


def test_only_the_standard_library_is_imported():
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    assert "argparse" in found and found - set(sys.stdlib_module_names) == {"launch"}


def test_it_runs_where_nothing_is_installed_and_no_variable_is_set():
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {['launch', 'local', '--', *COMMAND]!r}; "
    code += "runpy.run_module('launch', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], env={}, cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "#!/bin/bash\ntcjax train configs/boards.py\n", "")


@pytest.mark.parametrize("route", BUILT)
def test_every_route_has_the_same_four_things(route):
    module = importlib.import_module(f"launch.{route}")
    fields = {each.name for each in dataclasses.fields(module.Profile)}
    assert callable(module.text) and callable(module.submit) and module.__doc__
    assert set(module.FLAGS.values()) <= fields and all(flag.startswith("--") for flag in module.FLAGS)
    assert set(described(module.Profile)) == fields  # --help says something about each


@pytest.mark.parametrize("route", BUILT)
def test_the_help_of_a_route_names_its_flags_and_profiles(route, capsys):
    with pytest.raises(SystemExit) as ended:
        main([route, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert [flag for flag in importlib.import_module(f"launch.{route}").FLAGS if flag not in said] == []
    assert [name for name in known(route) if name not in said] == []


def test_the_help_lists_the_routes(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    assert all(f"  {route}" in capsys.readouterr().out for route in list(ROUTES)[:1])


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_is_one_of_a_route(path):
    served = [route for route in BUILT if path.stem in known(route)]
    assert served or len(BUILT) < len(ROUTES)
    for route in served:
        assert load_profile(importlib.import_module(f"launch.{route}").Profile, route, path.stem)


REFUSED = {
    "nowhere -- tcjax train x": "no route 'nowhere'; choose of slurm, local, gke_jobset, tpu_vm, skypilot.",
    "slurm": "no command: write it after --",
    "slurm -- ": "no command: write it after --",
    "slurm --profile nowhere -- tcjax train x": "--profile nowhere: not a known profile; choose of slurm_gpu, slurm_gpus_apart",
    "slurm --profile no/such.toml -- tcjax train x": "--profile no/such.toml: there is no such file.",
    "slurm --profile rehearsal -- tcjax train x": "has no table [slurm]; it has ['local']",
    "slurm --nods 2 -- tcjax train x": "unrecognized arguments: --nods 2; `python -m launch slurm --help` lists",
    "slurm --nodes two -- tcjax train x": "--nodes 'two': takes a whole number.",
    "slurm --nodes 0 -- tcjax train x": "slurm: nodes 0 is below 1.",
    "slurm --gpus-per-node 8 --tasks-per-node 4 -- tcjax train x": "takes 1 process for all GPUs of a node, or one for each (8)",
    "slurm --partition 'a\nb' -- tcjax train x": "slurm: partition 'a\\nb' has more than one line.",
    "slurm --name a_b -- tcjax train x": "--name 'a_b': a job's name is letters, digits and '-'",
    "slurm --grace 30 -- tcjax train x": "--grace 30 is shorter than --save-seconds 60: a preempted job would be killed while",
    "slurm --restarts -1 -- tcjax train x": "--restarts -1: takes a whole number from 0 up.",
    "slurm --env A -- tcjax train x": "--env A: takes NAME=VALUE.",
    "slurm --env 1A=2 -- tcjax train x": "--env 1A=...: an environment variable's name is",
    "slurm --log-folder '' -- tcjax train x": "--log-folder '': takes a folder's path",
    "slurm --study -- tcjax train x": "--study takes `tcjax ablate STUDY ...` after --, got `tcjax train x`.",
    "slurm --runs 2 -- tcjax train x": "--runs 2 takes a whole number from 1 up and `tcjax ablate STUDY` after --",
    "slurm --study -- no-such-program ablate x": "does not run here (No such file or directory): say how many",
    "slurm --study -- false ablate x": "`false ablate x --list` ended with 1: it printed nothing",
    "local --processes 0 -- tcjax train x": "local: processes 0 is below 1.",
    "local --submit -- no-such-program": "no-such-program does not start: No such file or directory.",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_user_can_cause_is_one_line_and_exit_code_2(words, capsys):
    assert main(shlex.split(words)) == 2
    said = capsys.readouterr()
    assert REFUSED[words] in said.err and said.err.count("\n") == 1 and not said.out


def test_a_missing_engine_says_where_to_submit(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "--submit", "--", *COMMAND]) == 2
    assert "sbatch is not on the PATH: submit on a login node of the cluster, or leave out" in capsys.readouterr().err


# Profiles ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster. size: of it. rate, name: two more. words: several. flag: yes or no. labels: by name."""

    size: int
    rate: float | None = None
    name: str = ""
    words: tuple[str, ...] = ()
    flag: bool = False
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


def cluster(tmp_path: Path, toml: str, **changes) -> Cluster:
    (tmp_path / "c.toml").write_text(f"[somewhere]\n{toml}")
    return load_profile(Cluster, "somewhere", str(tmp_path / "c.toml"), changes)


def test_a_flag_overrules_the_profiles_file(tmp_path):
    assert cluster(
        tmp_path, "size = 2\nwords = ['a b']\nlabels = {x = 'y'}\nflag = true", size="3", rate="0.5"
    ) == Cluster(size=3, rate=0.5, words=("a b",), flag=True, labels={"x": "y"})
    assert cluster(tmp_path, "size = 2\nrate = 1", words="a,b", flag=False).words == ("a", "b")


@pytest.mark.parametrize(
    "toml, message",
    [
        ("sizes = 2", "[somewhere] has no field sizes; choose of size, rate, name, words, flag, labels."),
        ("size = true", "size True: takes a whole number."),
        ("size = 1.5", "size 1.5: takes a whole number."),
        ("size = 1\nflag = 'yes'", "flag 'yes': takes true or false."),
        ("size = 1\nname = 2", "name 2: takes a text."),
        ("size = 1\nwords = [1]", "words 1: takes a text."),
        ("size = 1\nlabels = 'x'", "labels 'x': takes a table."),
        ("name = 'x'", "somewhere needs size: give a --profile or the flag of that name."),
        ("size = ", "Invalid value"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(tmp_path, toml, message):
    with pytest.raises(LaunchError) as refused:
        cluster(tmp_path, toml)
    assert message in str(refused.value)


def test_help_texts_are_read_from_the_docstring():
    said = described(Cluster)
    assert said["size"] == "of it." and said["rate"] == said["name"] == "two more." and said["labels"] == "by name."


# Jobs ----------------------------------------------------------------------------------------------------------------


def test_a_command_comes_back_after_a_signal_or_a_lost_process_and_after_nothing_else():
    assert [code for code in range(256) if comes_back(code)] == [42, 128, 129, *range(131, 256)]


@pytest.mark.parametrize(
    "command, name",
    [
        ("tcjax train configs/llava.py:pretrain_7b --train.steps 5", "llava-pretrain-7b"),
        ("tcjax ablate experiments/num_queries/", "num-queries"),
        ("python -m tcjax.cli train configs/boards.py", "boards"),
        ("/usr/bin/nvidia-smi -L", "nvidia-smi"),
        ("tcjax train", "tcjax"),
    ],
)
def test_a_job_is_named_after_what_it_runs(command, name):
    assert name_of(command.split()) == name and job(name=name)


def test_a_studys_runs_are_asked_of_the_study(tmp_path):
    script = tmp_path / "tcjax"
    script.write_text('#!/bin/sh\n[ "$*" = "ablate experiments/x --seeds 2 --list" ] && printf "x/a\\nx/b\\n"\n')
    script.chmod(0o755)
    assert study_runs((str(script), "ablate", "experiments/x", "--seeds", "2")) == ["x/a", "x/b"]
