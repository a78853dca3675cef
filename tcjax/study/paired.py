"""Two runs on the same questions: the difference of their mean accuracies, paired question by question.

Reads answers.jsonl of each run, one line per question: index (of the image), task, question, right. Tasks weigh the
same, as in the mean accuracy, and the caption stays out. Only for one seed each: with several, their spread counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tcjax.evaluate.scores import mean_tasks
from tcjax.evaluate.statistics import Estimate, difference
from tcjax.study.points import Point

FILE = "answers.jsonl"


class Question(NamedTuple):
    """Which image, what was asked."""

    image: int
    task: str
    text: str


Verdicts = dict[Question, bool]


def read(run: Path) -> Verdicts:
    """{question: answered right}; empty if the run left no answers, or none with a verdict."""
    path, verdicts = run / FILE, {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "right" in line:
            verdicts[Question(line["index"], line["task"], line["question"])] = bool(line["right"])
    return verdicts


def gain(a: Point, b: Point, verdicts: dict[str, Verdicts]) -> Estimate | None:
    """Mean accuracy of a minus that of b; None unless both are one run each that answered the very same questions."""
    if len(a.rows) != 1 or len(b.rows) != 1:
        return None
    right_a, right_b = verdicts.get(a.rows[0]["run"], {}), verdicts.get(b.rows[0]["run"], {})
    if not right_a or right_a.keys() != right_b.keys():
        return None
    counts: dict[str, int] = {}
    for question in right_a:
        counts[question.task] = counts.get(question.task, 0) + 1
    asked = [question for question in right_a if question.task in mean_tasks(counts)]
    return difference(
        [right_a[question] for question in asked],
        [right_b[question] for question in asked],
        images=[question.image for question in asked],
        weights=[1 / counts[question.task] for question in asked],
    )
