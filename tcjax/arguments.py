"""Words of the command line into values: a verb's form, whole numbers, a pair."""

from __future__ import annotations

from typing import Any

import tyro


def parse(form: type, arguments: list[str]) -> Any:
    verb = form.__name__.lower()
    return tyro.cli(form, args=arguments, prog=f"tcjax {verb}")


def numbers(text: str, flag: str) -> tuple[int, ...] | None:
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} takes whole numbers separated by commas, as in 64,16,4; got {text!r}.") from None


def pair(text: str, flag: str) -> tuple[int, int]:
    """Two sizes, "24x24" or "1024,4096"; ValueError unless both are whole numbers from 1 up."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"{flag} takes two whole numbers from 1 up, as in 24x24 or 1024,4096; got {text!r}.")
    return int(parts[0]), int(parts[1])
