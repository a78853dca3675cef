"""GQA (Hudson & Manning 2019): compositional questions on scene graphs; the answer's very string, x 100.

    official     the prediction as it is
    llava        lower case, final full stops off, then as official
    lmms-eval    case and punctuation ignored on both sides

binary and open: open is what its structural type calls "query". consistency: of rightly answered questions, the mean
accuracy on the questions their answer entails (those that are asked as well). distribution: chi square of the answers
against the truths within global groups, weighted by their size, / 100; lower is better, 0 for a perfect model.
Only balanced questions count in the accuracies. Validity and plausibility need a file of choices and are left out.
"""

from __future__ import annotations

import string
from collections import Counter
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
    load_json,
    means,
    published,
    share,
)

TITLE, HEADLINE = "GQA", "accuracy"
HEADLINE_PARTS = ("accuracy",)
MODES = ("official", "llava", "lmms-eval")
SPLITS = ("testdev_balanced", "testdev_all", "val_balanced", "val_all", "train_balanced", "test_balanced")
FILES = "<split>_questions.json, such as testdev_balanced_questions.json"
SCHEMA = "{qid: {question, imageId, answer, isBalanced, entailed: [qid], groups: {global}, types: {structural}}}"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read(folder: Path, split: str = "testdev_balanced", mode: str = "official") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    path = published(folder, [f"{split}_questions.json"], TITLE)
    content = load_json(path, TITLE, dict, SCHEMA)
    questions = []
    for number, item in content.items():
        text, image = fields_of(item, ["question", "imageId"], f"question {number} of {path}", SCHEMA)
        truths, fields = (), {"question": text}
        if not split.startswith("test_"):
            names = ["answer", "isBalanced", "entailed", "groups", "types"]
            answer, balanced, entailed, groups, types = fields_of(item, names, f"question {number} of {path}", SCHEMA)
            truths = (answer,)
            asked = [other for other in entailed if other != number and other in content]
            fields |= {
                "balanced": bool(balanced),
                "entailed": asked,
                "group": groups.get("global"),
                "structural": types.get("structural"),
                "semantic": types.get("semantic"),
            }
        questions.append(Question(number, text + SHORT_ANSWER, (f"images/{image}.jpg", f"{image}.jpg"), truths, fields))
    return questions


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    said = {question.id: _same(text, mode) for question, text in zip(questions, predictions, strict=True)}
    right = {question.id: said[question.id] == _truth(question, mode) for question in questions}
    judged = []
    for question in questions:
        fields, score, parts = question.fields, float(right[question.id]), {}
        if fields["balanced"]:
            kind = "open" if fields["structural"] == "query" else "binary"
            structural, semantic = fields["structural"], fields["semantic"]
            parts |= counted(score, ["accuracy", kind, f"structural/{structural}", f"semantic/{semantic}"])
            if fields["group"] is not None:
                parts |= {f"said/{fields['group']}/{said[question.id]}": 1.0}
                parts[f"truth/{fields['group']}/{_truth(question, mode)}"] = 1.0
            entailed = [right[other] for other in fields["entailed"] if other in right]
            if score and entailed:
                parts |= counted(sum(entailed) / len(entailed), ["consistency"])
        judged.append(Judged(score, parts))
    return judged


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    found = means(sums)
    truths = {name: sums[name] for name in sums if name.startswith("truth/")}
    if truths:
        found["distribution"] = _distribution(sums, truths)
    return found


def _distribution(sums: Sums, truths: dict[str, Any]) -> Any:
    """Sum over groups of chi square x size / sum of sizes, / 100."""
    chi, size = Counter(), Counter()
    for name, expected in truths.items():
        group = name.removeprefix("truth/").rpartition("/")[0]
        observed = sums.get(f"said/{name.removeprefix('truth/')}", 0.0)
        chi[group] = chi[group] + share((observed - expected) ** 2, expected)
        size[group] = size[group] + expected
    weighted = sum(chi[group] * size[group] for group in chi)
    return share(weighted, sum(size.values())) / 100


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    pairs = zip(questions, predictions, strict=True)
    rows = [{"questionId": question.id, "prediction": _same(said, mode)} for question, said in pairs]
    return {"testdev_balanced_predictions.json": as_json(rows)}


def max_tokens(mode: str) -> int:
    return 128 if mode == "llava" else 16


def _same(text: str, mode: str) -> str:
    if mode == "llava":
        return text.rstrip(".").lower()
    return text.lower().translate(_NO_PUNCTUATION) if mode == "lmms-eval" else text


def _truth(question: Question, mode: str) -> str:
    (answer,) = question.truths
    return _same(answer, mode) if mode == "lmms-eval" else answer
