"""Finds what a user names on the command line: `configs/boards.py:resampler` is a function in a file, in a project.

The project's root is the nearest folder above the file that holds a pyproject.toml, a .git or a configs/ folder (else the
file's own folder). Config files import their neighbours from the root (`from configs import towers`), and relative paths
inside configs are relative to it, so a project works the same from any working directory.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

MARKS = ("pyproject.toml", ".git", "configs")


def project_root(path: Path) -> Path:
    """The root of the project that `path` lies in."""
    start = path.resolve() if path.is_dir() else path.resolve().parent
    for folder in (start, *start.parents):
        if any((folder / mark).exists() for mark in MARKS):
            return folder
    return start


def load(path: Path) -> tuple[ModuleType, Path]:
    """Import a Python file by its path; return the module and the project's root."""
    if not path.is_file():
        raise ValueError(f"no such config file: {path}. Name a Python file, for instance configs/boards.py.")
    root = project_root(path)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    inside = path.resolve().relative_to(root).with_suffix("")
    name = ".".join(inside.parts)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # record.from_dict finds a user's own config classes here
    spec.loader.exec_module(module)
    return module, root


def call(target: str, default: str = "run") -> tuple[Any, Path]:
    """Call the function that "file.py:function" names (`default` if none is named); return its result and the root."""
    function, root = find(target, default)
    return function(), root


def find(target: str, default: str = "run") -> tuple[Callable[[], Any], Path]:
    """The function that "file.py:function" names (`default` if none is named), and the project's root."""
    text, _, name = target.rpartition(":") if target.rpartition(":")[2].isidentifier() else (target, "", "")
    module, root = load(Path(text or target))
    functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    if (name or default) not in functions:
        public = [n for n in functions if not n.startswith("_")]
        raise ValueError(
            f"{text or target} has no function {name or default!r}; choose {text or target}:NAME of {public}."
        )
    return getattr(module, name or default), root
