"""What every benchmark hands over: questions from its published files, and answers judged in parts that add up.

A suite is one module of this room with

    TITLE, MODES, HEADLINE       its name in words, the ways to ask and score (the first is the default), its one figure
    HEADLINE_PARTS               how the names of the parts begin which that figure is made of
    FILES, SPLITS                what must lie in the folder, and which splits there are (the first is the default)
    read(folder, split, mode)    -> [Question]; ValueError names what was expected of a missing or foreign file
    judge(questions, predictions, mode)   -> [Judged], one per question
    metrics(sums, mode)          -> {metric: value} of summed parts; sums may be arrays, one entry per resample
    submission(questions, predictions, mode) -> {file name: bytes} in the benchmark's own result format
    max_tokens(mode)             tokens an answer may have

Every figure is a function of sums over questions, so that resampling sums gives its interval. Nothing here knows a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

Sums = Mapping[str, Any]  # {part: float, or float array [resamples]}


class Question(NamedTuple):
    """id: unique in its split. prompt: what the model is asked, suffix included, without an image mark.

    images: where below the image folder its image may lie, tried in order; () is text alone.
    truths: () where the answers of a split are not published. fields: what this suite's groups need.
    choices: candidate answers; given, the likeliest is the prediction and nothing is generated.
    """

    id: str
    prompt: str
    images: tuple[str, ...]
    truths: tuple[str, ...]
    fields: dict[str, Any]
    choices: tuple[str, ...] = ()

    @property
    def cluster(self) -> str:
        """What is resampled together: the questions of one image."""
        return self.images[0] if self.images else f"text alone: {self.id}"


class Judged(NamedTuple):
    """score: of this answer alone, for the reader. parts: what it adds to the sums that `metrics` reads."""

    score: float
    parts: dict[str, float]


class Suite(Protocol):
    TITLE: str
    MODES: tuple[str, ...]
    HEADLINE: str
    HEADLINE_PARTS: tuple[str, ...]
    FILES: str
    SPLITS: Iterable[str]

    def read(self, folder: Path, split: str, mode: str) -> list[Question]: ...
    def judge(self, questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]: ...
    def metrics(self, sums: Sums, mode: str) -> dict[str, Any]: ...
    def submission(self, questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]: ...
    def max_tokens(self, mode: str) -> int: ...


# Means over groups ---------------------------------------------------------------------------------------------------


def counted(score: float, metrics: Iterable[str]) -> dict[str, float]:
    """Parts of a score that counts in several means: itself, and one under "<metric>#" to divide by."""
    parts = {}
    for metric in metrics:
        parts |= {metric: float(score), f"{metric}#": 1.0}
    return parts


def means(sums: Sums, scale: float = 100.0) -> dict[str, Any]:
    """{metric: scale * mean} of everything `counted` put into the sums, in order of the metrics' names."""
    names = sorted(name for name in sums if f"{name}#" in sums)
    return {name: scale * share(sums[name], sums[f"{name}#"]) for name in names}


def share(part: Any, whole: Any) -> Any:
    """part / whole, 0 where the whole is 0; numbers or arrays."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    ratio = np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)
    return ratio if ratio.ndim else float(ratio)


# Published files -----------------------------------------------------------------------------------------------------


def published(folder: Path, names: Sequence[str], suite: str) -> Path:
    """The first of `names` that lies in the folder; ValueError says which were looked for."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    looked = " or ".join(names)
    raise ValueError(
        f"{suite} needs {looked} in {folder}, which is not there; docs/benchmarks.md says where to get it."
    )


def load_json(path: Path, suite: str, form: type, schema: str) -> Any:
    """A JSON file whose top is a `form` (dict or list). schema: what it should look like, for the message."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {suite} expects {schema}.") from error
    if not isinstance(content, form):
        raise ValueError(f"{path} holds a {type(content).__name__}; {suite} expects {schema}.")
    return content


def load_lines(path: Path, suite: str, schema: str) -> list[dict]:
    """One JSON object per line."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}); {suite} expects {schema}.") from error
        if not isinstance(line, dict):
            raise ValueError(f"line {number} of {path} holds a {type(line).__name__}; {suite} expects {schema}.")
        lines.append(line)
    return lines


def fields_of(item: Any, names: Sequence[str], where: str, schema: str) -> list[Any]:
    """The values of `names` in one object of a file; ValueError names those it lacks."""
    if not isinstance(item, dict):
        raise ValueError(f"{where} is a {type(item).__name__}, but expected is {schema}.")
    missing = [name for name in names if name not in item]
    if missing:
        raise ValueError(f"{where} lacks {missing} (it has {sorted(item)}); expected is {schema}.")
    return [item[name] for name in names]


def listed(content: dict, name: str, path: Path, schema: str) -> list:
    """The list under `name` of a file's top object."""
    (items,) = fields_of(content, [name], str(path), schema)
    if not isinstance(items, list):
        raise ValueError(f"{name!r} of {path} is a {type(items).__name__}, but expected is {schema}.")
    return items


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def check_split(split: str, splits: Iterable[str], suite: str) -> None:
    if split not in (known := tuple(splits)):
        raise ValueError(f"{suite} has no split {split!r}; choose one of {', '.join(known)}.")
