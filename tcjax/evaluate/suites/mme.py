"""MME (Fu et al. 2023): two yes/no questions about every image in 14 subtasks.

Per subtask 100 acc + 100 acc+: acc over questions, acc+ over images with both answered rightly. perception is the sum
of ten subtasks (at most 2000), cognition of four (at most 800).

    official     the file's own sentence "Please answer yes or no."; lower case, exactly yes or no, else yes and then no
                 is looked for in the first four characters ("not sure" is no, "i think yes" is other)
    llava        that sentence replaced by the short-answer suffix; parsed as official
    lmms-eval    llava's prompt; white space and full stops go first, y and n count
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.evaluate.suites.question import SHORT_ANSWER, Judged, Question, Sums, check_split, published, share

TITLE, HEADLINE = "MME", "perception"
HEADLINE_PARTS = ("",)
MODES = ("official", "llava", "lmms-eval")
PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SPLITS = ("all", "perception", "cognition", *PERCEPTION, *COGNITION)
FILES = "<subtask>.txt of eval_tool/Your_Results, 14 of them"
SCHEMA = "lines of image TAB question TAB Yes or No, two consecutive lines per image"
OWN_SENTENCE = "Please answer yes or no."


def read(folder: Path, split: str = "all", mode: str = "official") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    groups = {"all": PERCEPTION + COGNITION, "perception": PERCEPTION, "cognition": COGNITION}
    questions = []
    for subtask in groups.get(split, (split,)):
        path = published(folder, [f"{subtask}.txt", f"Your_Results/{subtask}.txt"], TITLE)
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        rows = [line.split("\t") for line in lines]
        for number, row in enumerate(rows):
            beside = rows[number ^ 1] if number ^ 1 < len(rows) else [None]
            if len(row) < 3 or row[2].lower() not in ("yes", "no") or row[0] != beside[0]:
                raise ValueError(f"line {number + 1} of {path} is {lines[number]!r}; expected are {SCHEMA}.")
            image, text, truth = row[:3]
            prompt = text if mode == "official" else text.replace(OWN_SENTENCE, "").strip() + SHORT_ANSWER
            places = (f"{subtask}/{image}", f"{subtask}/images/{image}")
            fields = {"question": text, "subtask": subtask, "image": image, "number": number}
            questions.append(Question(f"{subtask}/{number}", prompt, places, (truth.lower(),), fields))
    return questions


def parse(said: str, mode: str) -> str:
    said = said.lower()
    if mode == "lmms-eval":
        said = said.strip().replace(".", "")
        if len(said) == 1:
            return {"y": "yes", "n": "no"}.get(said, "other")
    else:
        said = _one_cell(said)
    return "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else "other"


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    right = [parse(said, mode) == q.truths[0] for q, said in zip(questions, predictions, strict=True)]
    pairs: dict[tuple[str, int], list[bool]] = {}
    for question, verdict in zip(questions, right, strict=True):
        pairs.setdefault((question.fields["subtask"], question.fields["number"] // 2), []).append(verdict)
    judged = []
    for question, verdict in zip(questions, right, strict=True):
        subtask, number = question.fields["subtask"], question.fields["number"]
        parts = {f"right/{subtask}": float(verdict), f"asked/{subtask}": 1.0}
        if number % 2 == 0:  # the first question of an image speaks for both
            both = pairs[subtask, number // 2]
            parts |= {f"both/{subtask}": float(len(both) == 2 and all(both)), f"images/{subtask}": 1.0}
        judged.append(Judged(float(verdict), parts))
    return judged


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        asked = [subtask for subtask in subtasks if f"asked/{subtask}" in sums]
        for subtask in asked:
            found[f"acc/{subtask}"] = 100 * share(sums[f"right/{subtask}"], sums[f"asked/{subtask}"])
            found[f"acc+/{subtask}"] = 100 * share(sums.get(f"both/{subtask}", 0), sums.get(f"images/{subtask}", 0))
            found[f"score/{subtask}"] = found[f"acc/{subtask}"] + found[f"acc+/{subtask}"]
        found[name] = sum(found[f"score/{subtask}"] for subtask in asked)
    found["total"] = found["perception"] + found["cognition"]
    return found


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    """One result file per subtask, for the official calculation.py."""
    files: dict[str, bytes] = {}
    for question, said in zip(questions, predictions, strict=True):
        fields, name = question.fields, f"{question.fields['subtask']}.txt"
        row = (fields["image"], fields["question"], question.truths[0].capitalize(), _one_cell(said))
        files[name] = files.get(name, b"") + ("\t".join(row) + "\n").encode()
    return files


def _one_cell(said: str) -> str:
    """As the last cell of a result file's line; leading spaces count, as they do there."""
    return said.replace("\n", " ").replace("\t", " ")


def max_tokens(mode: str) -> int:
    return 128 if mode == "llava" else 16
