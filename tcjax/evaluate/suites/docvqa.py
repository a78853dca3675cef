"""DocVQA (Mathew et al. 2021): questions about scanned documents; ANLS, the average normalised Levenshtein similarity x 100.

    score = max over the answers of 1 - distance / longer length, 0 below 0.5

    official     both lower-cased and stripped; the empty prediction and the word "none" score 0 (MP-DocVQA's evaluator)
    lmms-eval    both lower-cased with white space collapsed, but divided by the length of the raw strings (VLMEvalKit too)

A similarity of exactly 0.5 is kept, as in all the code we read; what the task's paper says of it is unverified.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.evaluate.suites.question import (
    SHORT_ANSWER,
    Judged,
    Question,
    Sums,
    as_json,
    check_split,
    counted,
    fields_of,
    listed,
    load_json,
    means,
    published,
)

TITLE, HEADLINE = "DocVQA", "ANLS"
HEADLINE_PARTS = ("ANLS",)
MODES = ("official", "lmms-eval")
SPLITS = ("val", "train", "test")
FILES = "<split>_v1.0.json or <split>_v1.0_withQT.json"
SCHEMA = "{data: [{questionId, question, image, answers: [strings] (none of test)}, ...]}"
THRESHOLD = 0.5


def read(folder: Path, split: str = "val", mode: str = "official") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    path = published(folder, [f"{split}_v1.0.json", f"{split}_v1.0_withQT.json"], TITLE)
    questions = []
    for item in listed(load_json(path, TITLE, dict, SCHEMA), "data", path, SCHEMA):
        number, text, image = fields_of(item, ["questionId", "question", "image"], f"a question of {path}", SCHEMA)
        truths = tuple(item.get("answers", ()))
        if not truths and split != "test":
            raise ValueError(f"question {number} of {path} has no answers; expected is {SCHEMA}.")
        fields = {"question": text, "question_types": list(item.get("question_types") or ())}
        places = (image, image.rpartition("/")[2])
        questions.append(Question(str(number), text + SHORT_ANSWER, places, truths, fields))
    return questions


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    judged = []
    for question, said in zip(questions, predictions, strict=True):
        score = anls(said, question.truths, mode)
        groups = [f"question type/{kind}" for kind in question.fields["question_types"]]
        judged.append(Judged(score, counted(score, ["ANLS", *groups])))
    return judged


def anls(prediction: str, answers: Sequence[str], mode: str = "official") -> float:
    """Of one prediction, in [0, 1]. ("cats", ["cat"]) is 0.75."""
    best = max(similarity(prediction, answer, mode) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def similarity(prediction: str, answer: str, mode: str) -> float:
    if mode == "lmms-eval":
        said, right = " ".join(prediction.lower().split()), " ".join(answer.lower().split())
        length = max(len(prediction.upper()), len(answer.upper()))
        return 1 - distance(said, right) / length if length else 1.0
    said, right = prediction.lower().strip(), answer.lower().strip()
    if not said or said == "none":
        return 0.0
    return 1 - distance(said, right) / max(len(said), len(right))


def distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions from one to the other."""
    before = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        here = [i]
        for j, other in enumerate(b, 1):
            here.append(min(here[-1] + 1, before[j] + 1, before[j - 1] + (letter != other)))
        before = here
    return before[-1]


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    return means(sums)


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    pairs = zip(questions, predictions, strict=True)
    return {"docvqa_submission.json": as_json([{"questionId": int(q.id), "answer": said} for q, said in pairs])}


def max_tokens(mode: str) -> int:
    return 32
