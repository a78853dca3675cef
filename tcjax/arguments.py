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
    found = numbers(text.replace("x", ","), flag) or ()
    if len(found) != 2:
        raise ValueError(f"{flag} takes two whole numbers, as in 24x24; got {text!r}.")
    return found[0], found[1]
