"""POPE (Li et al. 2023): is there a ... in the image? Three files of 3,000 yes/no questions that differ in what is absent.

Per file and yes being positive: accuracy, precision, recall, F1, share of yes among the predictions; the headline is the
mean of the files' F1, x 100.

    official     up to the first full stop, commas off, split at single spaces: no if one word is No, not or no, else yes.
                 So NO, the empty answer and "none" are yes
    llava        the same parser; the short-answer suffix in the prompt
    lmms-eval    exactly yes or no in any case; anything else is wrong and counts neither as yes nor as no
    vlmevalkit   the words yes and no after VQA's punctuation rule; both or neither is wrong
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcjax.evaluate.suites.question import (
    SHORT_ANSWER,
    Judged,
    Question,
    Sums,
    as_json,
    check_split,
    fields_of,
    load_lines,
    published,
    share,
)
from tcjax.evaluate.suites.soft_accuracy import without_punctuation

TITLE, HEADLINE = "POPE", "F1"
HEADLINE_PARTS = ("tp/", "fp/", "fn/")
MODES = ("official", "llava", "lmms-eval", "vlmevalkit")
KINDS = ("random", "popular", "adversarial")
SPLITS = ("all", *KINDS)
FILES = "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json (also in a folder coco)"
SCHEMA = 'lines of {question_id, image, text, label: "yes" or "no"}'


def read(folder: Path, split: str = "all", mode: str = "official") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    questions = []
    for kind in KINDS if split == "all" else (split,):
        path = published(folder, [f"coco_pope_{kind}.json", f"coco/coco_pope_{kind}.json"], TITLE)
        for line in load_lines(path, TITLE, SCHEMA):
            names = ["question_id", "image", "text", "label"]
            number, image, text, label = fields_of(line, names, f"a line of {path}", SCHEMA)
            if label not in ("yes", "no"):
                raise ValueError(f"question {number} of {path} has label {label!r}; expected are {SCHEMA}.")
            prompt = text if mode == "official" else text.strip() + SHORT_ANSWER
            fields = {"question": text, "kind": kind, "question_id": number}
            places = (image, f"val2014/{image}")
            questions.append(Question(f"{kind}/{number}", prompt, places, (label,), fields))
    return questions


def parse(said: str, mode: str) -> str:
    """yes, no, or other, which is wrong whatever the truth."""
    if mode == "lmms-eval":
        word = said.lower().strip()
        return word if word in ("yes", "no") else "other"
    if mode == "vlmevalkit":
        words = without_punctuation(said.lower()).split()
        yes, no = "yes" in words, "no" in words
        return "other" if yes == no else "yes" if yes else "no"
    words = said.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    judged = []
    for question, said in zip(questions, predictions, strict=True):
        kind, truth, heard = question.fields["kind"], question.truths[0], parse(said, mode)
        parts = {f"asked/{kind}": 1.0, f"right/{kind}": float(heard == truth), f"yes/{kind}": float(heard == "yes")}
        parts[f"tp/{kind}"] = float(heard == truth == "yes")
        parts[f"fp/{kind}"] = float(heard == "yes" and truth == "no")
        # lmms-eval counts an answer that is neither in no cell; the others have only yes and no, or call it missed.
        missed = heard == "no" or (heard == "other" and mode == "vlmevalkit")
        parts[f"fn/{kind}"] = float(missed and truth == "yes")
        judged.append(Judged(parts[f"right/{kind}"], parts))
    return judged


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        if f"tp/{kind}" not in sums:
            continue
        tp, fp, fn = (sums[f"{cell}/{kind}"] for cell in ("tp", "fp", "fn"))
        found[f"F1/{kind}"] = 100 * share(2 * tp, 2 * tp + fp + fn)
        if f"asked/{kind}" in sums:
            asked = sums[f"asked/{kind}"]
            found[f"accuracy/{kind}"] = 100 * share(sums[f"right/{kind}"], asked)
            found[f"precision/{kind}"] = 100 * share(tp, tp + fp)
            found[f"recall/{kind}"] = 100 * share(tp, tp + fn)
            found[f"yes/{kind}"] = 100 * share(sums[f"yes/{kind}"], asked)
    for metric in ("F1", "accuracy", "precision", "recall", "yes"):
        values = [value for name, value in found.items() if name.startswith(f"{metric}/")]
        if values:
            mean = np.mean(values, axis=0)
            found[metric] = mean if mean.ndim else float(mean)
    return found


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    """The answer file of every kind: lines of {question, answer}, in the order of the questions."""
    files: dict[str, bytes] = {}
    for question, said in zip(questions, predictions, strict=True):
        name = f"coco_pope_{question.fields['kind']}_answers.json"
        line = {"question_id": question.fields["question_id"], "question": question.fields["question"], "answer": said}
        files[name] = files.get(name, b"") + as_json(line) + b"\n"
    return files


def max_tokens(mode: str) -> int:
    return 16 if mode == "official" else 128
