"""Writes YAML that nothing reads otherwise: dict, list, str, int, bool and None, in block style, in the order given.

A string stands plain only where it begins with a letter or `/` and holds letters, digits and `_ . / - :` inside, and is no word
that some YAML reads as a truth value or as nothing (`yes`, `off`, `null`). Text of several lines becomes a literal block,
so that a script in a manifest stays a script; everything else is double-quoted. Lists of numbers are written on one line.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

Value = dict | list | str | int | bool | None
WIDTH = 110

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*")
_TAKEN = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"}  # in any spelling of case
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def dump(value: Value) -> str:
    """One document, with its last newline."""
    head, body = _node(value)
    return "\n".join(([head] if head else []) + _under(head, body)) + "\n"


def documents(values: Sequence[Value]) -> str:
    """Several documents in one file, as `kubectl create -f` takes them."""
    return "---\n".join(dump(value) for value in values)


def _node(value: Value) -> tuple[str, list[str]]:
    """What stands on the line of the key or dash, and the lines below it, not yet indented."""
    if isinstance(value, dict) and value:
        return "", [line for key, each in value.items() for line in _entry(f"{_string(key)}:", each)]
    if isinstance(value, list) and value:
        if all(isinstance(each, int) and not isinstance(each, bool) for each in value):
            return _numbers(value)
        return "", [line for each in value for line in _item(each)]
    if isinstance(value, str):
        return _text(value) if _reads_as_block(value) else (_string(value), [])
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value], []
    if isinstance(value, int):
        return str(value), []
    if isinstance(value, dict | list):
        return "{}" if isinstance(value, dict) else "[]", []
    raise TypeError(f"{value!r} is a {type(value).__name__}: YAML here is dict, list, str, int, bool and None.")


def _entry(key: str, value: Value) -> list[str]:
    head, body = _node(value)
    return [f"{key} {head}".rstrip(), *_under("-", body)]


def _item(value: Value) -> list[str]:
    head, body = _node(value)
    if head:
        return [f"- {head}", *_under(head, body)]
    return [f"- {body[0]}", *_under("-", body[1:])]


def _under(head: str, body: list[str]) -> list[str]:
    """Indented below its head; a container that is the whole document has none."""
    return [f"  {line}" if head and line else line for line in body]


def _string(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is a {type(text).__name__}: keys here are strings.")
    return text if _PLAIN.fullmatch(text) and text.lower() not in _TAKEN else _quoted(text)


def _quoted(text: str) -> str:
    return '"' + "".join(_ESCAPES.get(letter) or _escaped(letter) for letter in text) + '"'


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0x20 <= code < 0x7F:
        return letter
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _reads_as_block(text: str) -> bool:
    """Several lines of printable ASCII (tabs too), none of which would change the indentation or its end."""
    lines = text.split("\n")
    clean = all(each.isascii() and (each.isprintable() or each.replace("\t", "").isprintable()) for each in lines)
    bounded = lines[0][:1] not in ("", " ", "\t") and (lines[-1] == "" or not lines[-1].isspace())
    return len(lines) > 1 and clean and bounded


def _text(text: str) -> tuple[str, list[str]]:
    """`|-` ends without a newline, `|` with one, `|+` with several."""
    end = "-" if not text.endswith("\n") else "+" if text.endswith("\n\n") else ""
    return f"|{end}", (text if end == "-" else text[:-1]).split("\n")


def _numbers(values: list) -> tuple[str, list[str]]:
    lines = textwrap.wrap(f"[{', '.join(map(str, values))}]", WIDTH)
    return lines[0], lines[1:]
