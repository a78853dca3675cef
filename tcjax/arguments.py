"""Words of the command line into values: a verb's form, with a config's fields beside it, whole numbers, a pair."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

Form = TypeVar("Form")


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


def parse_run(form: type[Form], default: Any, verb: str, arguments: list[str]) -> tuple[Form, Any]:
    """The flags of a verb about a config, and the config's run with the fields that were given beside them.

    Args:
        form: a dataclass of the verb's own flags. default: the run as the config has it. arguments: the config first.
    """
    types = get_type_hints(form)
    fields = [(field.name, types[field.name], field) for field in dataclasses.fields(form)]  # pyright: ignore
    run = ("run", Annotated[type(default), tyro.conf.arg(name="")])
    both = dataclasses.make_dataclass(verb, [run, *fields], kw_only=True, namespace={"__doc__": form.__doc__})
    needed = {name: tyro.MISSING for name, _, field in fields if field.default is dataclasses.MISSING}
    asked: Any = tyro.cli(
        both,
        args=arguments[1:],
        default=both(run=default, **needed),
        prog=f"tcjax {verb} {arguments[0]}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return form(**{name: getattr(asked, name) for name, _, _ in fields}), asked.run
