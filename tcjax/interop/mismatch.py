"""All that is wrong with a set of weights in one error: MISSING, UNEXPECTED, SHAPE, with near names suggested."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

Shape = tuple[int, ...]
_LINES = 20  # per group; the count says how many there are
_FEW = 3  # where no name fits, a list of all names would say no more


class WeightMismatch(ValueError):
    """Weights that are not exactly those asked for; `missing`, `unexpected` and `misshapen` hold their names."""

    def __init__(self, message: str, missing: list[str], unexpected: list[str], misshapen: list[str]):
        super().__init__(message)
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen


def mismatch(found: Mapping[str, Shape], expected: Mapping[str, Shape | None], what: str) -> WeightMismatch | None:
    """The error if `found` is not exactly `expected`; an expected shape of None allows any."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        (key, found[key], shape)
        for key, shape in sorted(expected.items())
        if key in found and shape is not None and tuple(found[key]) != tuple(shape)
    ]
    if not (missing or unexpected or misshapen):
        return None
    strangers = collapse(unexpected)
    foreign = len(missing) == len(expected) and len(found) > _FEW
    groups = [
        ("MISSING", len(missing), [_suggest(name, strangers) for name in collapse(missing)]),
        ("UNEXPECTED", len(unexpected), strangers),
        ("SHAPE", len(misshapen), [_describe(*item) for item in misshapen]),
    ]
    lines = [f"{len(found)} {what} do not fit the {len(expected)} that are asked for:"]
    if foreign:
        lines = [
            f"none of these {len(found)} {what} is one of the {len(expected)} that are asked for: another architecture?"
        ]
    shown = _FEW if foreign else _LINES
    for title, count, group in groups:
        if count:
            lines.append(f"  {title} ({count})")
            lines += [f"    {line}" for line in group[:shown]]
            if len(group) > shown:
                lines.append(f"    ... and {len(group) - shown} more lines")
    return WeightMismatch("\n".join(lines), missing, unexpected, [name for name, _, _ in misshapen])


def collapse(names: Iterable[str]) -> list[str]:
    """Names that differ only in their first number as one line: layers.0.w, layers.1.w -> layers.{0..1}.w."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"(?<![^./])\d+(?![^./])", name)
        template = name if match is None else f"{name[: match.start()]}{{}}{name[match.end() :]}"
        numbers.setdefault(template, []).extend([] if match is None else [int(match.group())])
    return [template.replace("{}", _span(sorted(found)), 1) for template, found in numbers.items()]


def _span(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


def _suggest(name: str, others: list[str]) -> str:
    close = difflib.get_close_matches(name, others, 1, cutoff=0.75)
    return f"{name}   (did you mean the unexpected {close[0]}?)" if close else name


def _describe(name: str, found: Shape, expected: Shape) -> str:
    hint = "   TRANSPOSED?" if tuple(found) == tuple(reversed(expected)) else ""
    return f"{name}: {list(found)} there, {list(expected)} asked for{hint}"
