"""The door: `python -m launch ROUTE [flags] -- COMMAND ...` prints the job; --submit sends it.

Whatever a user can cause is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

from launch.job import Job, LaunchError, described, known, load_profile, study_runs

ROUTES = {
    "slurm": "an sbatch script: requeued when preempted; a study is one array job",
    "local": "processes on this machine, restarted like a cluster would",
    "gke_jobset": "a JobSet manifest for TPU slices or GPU nodes of a Kubernetes cluster",
    "tpu_vm": "queued resources of Cloud TPU, one slice or several, by gcloud",
    "skypilot": "a task file for SkyPilot",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise LaunchError(f"{message}; `{self.prog} --help` lists the flags.")


def main(argv: Sequence[str] | None = None) -> int:
    """Print or submit one job; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    try:
        return launched(words)
    except LaunchError as error:
        print(f"launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def usage() -> str:
    lines = [
        "usage: python -m launch ROUTE [flags] -- COMMAND ...",
        "",
        "Prints the job that runs COMMAND by that route; --submit sends it.",
        "",
        *(f"  {name:<12}{about}" for name, about in ROUTES.items()),
        "",
        "  python -m launch slurm --profile slurm_gpu -- tcjax train configs/llava.py:pretrain_7b",
        "  python -m launch slurm --profile slurm_gpu --study --submit -- tcjax ablate experiments/num_queries",
        "",
        "python -m launch ROUTE --help lists its flags and profiles.",
    ]
    return "\n".join(lines)


def launched(words: list[str]) -> int:
    route = words[0]
    if route not in ROUTES:
        raise LaunchError(f"no route {route!r}; choose of {', '.join(ROUTES)}.")
    end = words.index("--") if "--" in words else len(words)
    command = tuple(words[end + 1 :])
    module = importlib.import_module(f"launch.{route}")
    asked = parser(route, module).parse_args(words[1:end])
    changes = {
        name: value for name in module.FLAGS.values() if (value := getattr(asked, f"profile_{name}")) is not None
    }
    profile = load_profile(module.Profile, route, asked.profile, changes)
    job = job_of(asked, command)
    if asked.submit:
        return module.submit(job, profile)
    sys.stdout.write(module.text(job, profile))
    return 0


def parser(route: str, module: types.ModuleType) -> Parser:
    """The flags of one route: those of the job, and those that overrule its profile."""
    about = (module.__doc__ or "").partition("\n")[0]
    names = ", ".join(known(route)) or "none yet"
    made = Parser(
        prog=f"python -m launch {route}",
        usage=f"python -m launch {route} [flags] -- COMMAND ...",
        description=f"{about} Profiles in launch/profiles: {names}.",
        allow_abbrev=False,
    )
    made.add_argument("--profile", default="", metavar="NAME", help="a name in launch/profiles, or a .toml file")
    made.add_argument("--submit", action="store_true", help="send the job; without, it is printed")
    made.add_argument("--study", action="store_true", help="COMMAND is `tcjax ablate STUDY`: one job per run of it")
    made.add_argument("--runs", type=int, default=0, metavar="N", help="as --study, where tcjax is not installed")
    made.add_argument("--name", default="", help="the job's name (default: made of COMMAND)")
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be given several times")
    told, defaults = described(Job), {each.name: each.default for each in dataclasses.fields(Job)}
    for name in ("restarts", "grace", "save_seconds", "log_folder"):
        default: Any = defaults[name]
        text = f"{told[name]} (default: {default})"
        made.add_argument(f"--{name.replace('_', '-')}", default=default, type=type(default), metavar="X", help=text)
    group = made.add_argument_group("what overrules the profile")
    told, hints = described(module.Profile), typing.get_type_hints(module.Profile)
    for flag, name in module.FLAGS.items():
        facts: dict[str, Any] = {"dest": f"profile_{name}", "default": None, "help": told.get(name, name)}
        facts["help"] = facts["help"].replace("%", "%%")
        if hints[name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **facts)
        else:
            group.add_argument(flag, metavar="X", **facts)
    return made


def job_of(asked: argparse.Namespace, command: tuple[str, ...]) -> Job:
    env = {}
    for word in asked.env:
        name, equals, value = word.partition("=")
        if not equals:
            raise LaunchError(f"--env {word}: takes NAME=VALUE.")
        env[name] = value
    made = Job(
        name=asked.name or name_of(command),
        command=command,
        env=env,
        restarts=asked.restarts,
        grace=asked.grace,
        save_seconds=asked.save_seconds,
        log_folder=asked.log_folder,
    )
    if asked.runs < 0 or (asked.runs and "ablate" not in command):
        raise LaunchError(
            f"--runs {asked.runs} takes a whole number from 1 up and `tcjax ablate STUDY` after --, "
            f"got `{shlex.join(command)}`."
        )
    runs = asked.runs or (len(study_runs(command)) if asked.study else 0)
    return dataclasses.replace(made, runs=runs)


def name_of(command: Sequence[str]) -> str:
    """A job's name from what it runs: `tcjax train configs/llava.py:pretrain_7b` is llava-pretrain-7b."""
    verbs = [place for place, word in enumerate(command) if word in ("train", "ablate")]
    word = command[verbs[0] + 1] if verbs and verbs[0] + 1 < len(command) else (command or ("job",))[0]
    last = word.rstrip("/").rpartition("/")[2].replace(".py", "")
    return re.sub(r"[^A-Za-z0-9]+", "-", last).strip("-")[:40].strip("-") or "job"


if __name__ == "__main__":
    raise SystemExit(main())
