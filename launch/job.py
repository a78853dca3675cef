"""What all routes share: the job, the profile of a cluster, and how a program is called.

A `Job` says what runs and how it comes back; a route's `Profile` says where. A profile is a small TOML file with one table
per route it serves, and the route's `Profile` dataclass names the fields:

    [slurm]
    nodes = 2
    partition = "gpu"

A training tells its launcher by its exit code what to do: 0 it is done; 42 a process was lost, 143 (or another signal's
128 + n) it was stopped: run the same command again; 130 somebody pressed Ctrl-C, 1 and 2 an error that would come again.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parent / "profiles"
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a list",
    dict: "a table",
}
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class LaunchError(ValueError):
    """What a user can cause: the rule, the values and the way out, in one line."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What runs, and how it comes back.

    name: letters, digits and "-". command: the words after `--`. runs: of a study; each is `command --run K`, K from 1;
    0 is one plain job. env: further environment variables. restarts: how often it comes back after a preemption. grace:
    seconds between SIGTERM and SIGKILL. save_seconds: what a save may take. log_folder: where its output goes.
    """

    name: str
    command: tuple[str, ...]
    runs: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    restarts: int = 10
    grace: int = 120
    save_seconds: int = 60
    log_folder: str = "runs/logs"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise LaunchError(f"--name {self.name!r}: a job's name is letters, digits and '-', as in llava-7b.")
        if not self.command:
            raise LaunchError("no command: write it after --, as in `python -m launch slurm -- tcjax train CONFIG`.")
        for name in ("runs", "restarts", "grace", "save_seconds"):
            if getattr(self, name) < 0:
                raise LaunchError(f"--{name.replace('_', '-')} {getattr(self, name)}: takes a whole number from 0 up.")
        if self.grace < self.save_seconds:
            raise LaunchError(
                f"--grace {self.grace} is shorter than --save-seconds {self.save_seconds}: a preempted job would be "
                f"killed while it saves; raise the grace or say that a save is faster."
            )
        for name in self.env:
            if not VARIABLE.fullmatch(name):
                raise LaunchError(f"--env {name}=...: an environment variable's name is letters, digits and '_'.")
        if not self.log_folder or "\n" in self.log_folder:
            raise LaunchError(f"--log-folder {self.log_folder!r}: takes a folder's path on one line.")


def comes_back(code: int) -> bool:
    """Whether a command that ended with this exit code is to be run again."""
    return code == 42 or (128 <= code <= 255 and code != 130)


def study_runs(command: Sequence[str]) -> list[str]:
    """Names of a study's runs, as `command --list` prints them."""
    words = [*command, "--list"]
    if "ablate" not in command:
        raise LaunchError(f"--study takes `tcjax ablate STUDY ...` after --, got `{shlex.join(command)}`.")
    try:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise LaunchError(
            f"`{shlex.join(words)}` does not run here ({error.strerror}): say how many runs it has with --runs N."
        ) from None
    names = done.stdout.split("\n")[:-1]
    if done.returncode or not names:
        said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").rpartition("\n")[2]
        raise LaunchError(f"`{shlex.join(words)}` ended with {done.returncode}: {said}")
    return names


def called(words: Sequence[str], *, stdin: str | None = None, where: str = "") -> int:
    """Run an engine's own program, with our output; its exit code. where: on which machine it is to be found."""
    if not shutil.which(words[0]):
        raise LaunchError(
            f"{words[0]} is not on the PATH: submit {where or 'where it is installed'}, or leave out --submit to print."
        )
    sys.stdout.flush()
    return subprocess.run(list(words), input=stdin, text=True).returncode


# Profiles ------------------------------------------------------------------------------------------------------------


def load_profile(kind: type, route: str, name: str = "", changes: Mapping[str, Any] | None = None) -> Any:
    """The route's Profile from a file or a name in launch/profiles, `changes` (by field) over it; the defaults without."""
    facts: dict[str, Any] = {}
    if name:
        path = _find(name, route)
        try:
            tables = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise LaunchError(f"profile {path}: {error}") from None
        if not isinstance(tables.get(route), dict):
            raise LaunchError(f"profile {path} has no table [{route}]; it has {sorted(tables)}.")
        facts = tables[route]
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(facts) - set(hints))
    if unknown:
        raise LaunchError(f"profile {name}: [{route}] has no field {', '.join(unknown)}; choose of {', '.join(hints)}.")
    values = {key: _fitted(value, hints[key], f"profile {name}: {key}") for key, value in facts.items()}
    values |= {key: _fitted(value, hints[key], f"--{key.replace('_', '-')}") for key, value in (changes or {}).items()}
    lacking = [each.name for each in dataclasses.fields(kind) if _required(each) and each.name not in values]
    if lacking:
        raise LaunchError(f"{route} needs {', '.join(lacking)}: give a --profile or the flag of that name.")
    return kind(**values)


def known(route: str) -> list[str]:
    """Names of the profiles in launch/profiles with a table for this route."""
    return sorted(path.stem for path in PROFILES.glob("*.toml") if route in tomllib.loads(path.read_text()))


def described(kind: type) -> dict[str, str]:
    """{field: what the dataclass's docstring says about it}, for --help. Written `name: text` or `name, name: text`."""
    text = " ".join((kind.__doc__ or "").split())
    names = "|".join(each.name for each in dataclasses.fields(kind))
    parts = re.split(rf"(?:^|\s)((?:{names})(?:, (?:{names}))*): ", text)
    said = zip(parts[1::2], parts[2::2], strict=True)
    return {name: about.strip() for group, about in said for name in group.split(", ")}


def _required(each: dataclasses.Field) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _find(name: str, route: str) -> Path:
    here = Path(name)
    if here.suffix == ".toml" or here.parent != Path("."):
        if not here.is_file():
            raise LaunchError(f"--profile {name}: there is no such file.")
        return here
    path = PROFILES / f"{name}.toml"
    if not path.is_file():
        raise LaunchError(
            f"--profile {name}: not a known profile; choose of {', '.join(known(route)) or 'none'}, or give a .toml file."
        )
    return path


def _fitted(value: Any, hint: Any, what: str) -> Any:
    """A value of a TOML file, or the words of a flag, as a field of this type."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(each for each in typing.get_args(hint) if each is not types.NoneType)
    origin, flag = typing.get_origin(hint) or hint, isinstance(value, str)
    if origin is bool and isinstance(value, bool):
        return value
    if origin is str and flag:
        return value
    if origin in (int, float) and not isinstance(value, bool) and (flag or isinstance(value, int | origin)):
        turn: Callable[[Any], Any] = origin
        try:
            return turn(value)
        except ValueError:
            pass
    if origin is tuple and isinstance(value, str | list):
        words = [word for word in value.split(",") if word] if isinstance(value, str) else value
        return tuple(_fitted(word, typing.get_args(hint)[0], what) for word in words)
    if origin is dict and isinstance(value, dict):
        item = typing.get_args(hint)[1]
        return {key: _fitted(word, item, what) for key, word in value.items()}
    raise LaunchError(f"{what} {value!r}: takes {WORDS[origin]}.")
