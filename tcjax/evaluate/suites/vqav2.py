"""VQAv2 (Goyal et al. 2017): open questions about COCO images, ten people's answers each; soft accuracy x 100.

    official     the published scorer
    llava        the prediction is normalised before it is submitted, then the published scorer
    lmms-eval    answers are always normalised
    vlmevalkit   the same with its own rule for full stops

The test splits have questions only: their predictions become a submission.
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
from tcjax.evaluate.suites.soft_accuracy import flat, normalise, soft_accuracy

TITLE, HEADLINE = "VQAv2", "accuracy"
HEADLINE_PARTS = ("accuracy",)
MODES = ("official", "llava", "lmms-eval", "vlmevalkit")
SPLITS = {"val": "val2014", "train": "train2014", "test": "test2015", "test-dev": "test-dev2015"}
FILES = "v2_OpenEnded_mscoco_<split>_questions.json, v2_mscoco_<split>_annotations.json (none of test)"
QUESTIONS = "{questions: [{image_id, question, question_id}, ...]}"
ANNOTATIONS = "{annotations: [{question_id, question_type, answer_type, answers: [{answer, ...} x 10]}, ...]}"

_DIALECT = {"official": "official", "llava": "official", "lmms-eval": "always", "vlmevalkit": "vlmevalkit"}


def read(folder: Path, split: str = "val", mode: str = "official") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    year = SPLITS[split]
    path = published(folder, [f"v2_OpenEnded_mscoco_{year}_questions.json"], TITLE)
    asked = listed(load_json(path, TITLE, dict, QUESTIONS), "questions", path, QUESTIONS)
    hidden = split.startswith("test")
    answers = {} if hidden else _annotations(folder, year)
    questions, coco = [], year.replace("-dev", "")
    for item in asked:
        image, text, number = fields_of(
            item, ["image_id", "question", "question_id"], f"a question of {path}", QUESTIONS
        )
        name = f"COCO_{coco}_{image:012d}.jpg"
        truths, fields = (), {"question": text}
        if not hidden:
            if number not in answers:
                raise ValueError(f"question {number} of {path} has no annotation; both files must be of one split.")
            kind, form, truths = answers[number]
            fields |= {"question_type": kind, "answer_type": form}
        questions.append(Question(str(number), text + SHORT_ANSWER, (f"{coco}/{name}", name), truths, fields))
    return questions


def _annotations(folder: Path, year: str) -> dict[int, tuple[str, str, tuple[str, ...]]]:
    path = published(folder, [f"v2_mscoco_{year}_annotations.json"], TITLE)
    found = {}
    for item in listed(load_json(path, TITLE, dict, ANNOTATIONS), "annotations", path, ANNOTATIONS):
        names = ["question_id", "question_type", "answer_type", "answers"]
        number, kind, form, given = fields_of(item, names, f"an annotation of {path}", ANNOTATIONS)
        where = f"answers of question {number} in {path}"
        found[number] = (kind, form, tuple(fields_of(one, ["answer"], where, ANNOTATIONS)[0] for one in given))
    return found


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    judged = []
    for question, said in zip(questions, predictions, strict=True):
        score = soft_accuracy(_submitted(said, mode), question.truths, _DIALECT[mode])
        kind, form = question.fields["question_type"], question.fields["answer_type"]
        judged.append(Judged(score, counted(score, ["accuracy", f"answer type/{form}", f"question type/{kind}"])))
    return judged


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    return means(sums)


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    pairs = zip(questions, predictions, strict=True)
    rows = [{"question_id": int(question.id), "answer": _submitted(said, mode)} for question, said in pairs]
    return {"v2_OpenEnded_mscoco_results.json": as_json(rows)}


def max_tokens(mode: str) -> int:
    return 128 if mode == "llava" else 16


def _submitted(said: str, mode: str) -> str:
    return normalise(said, "m4c") if mode == "llava" else flat(said)
