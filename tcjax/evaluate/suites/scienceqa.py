"""ScienceQA (Lu et al. 2022): multiple-choice questions of school science, some with an image; accuracy x 100.

    llava        "Context: ... Question: ... Options: (A) ... (B) ..."; the answer is a letter, or starts with a letter and
                 ". ", or says "The answer is X." once; anything else is wrong
    lmms-eval    context, question and one option per line; a letter in any case, or a capital letter and a full stop

IMG is the accuracy on questions with an image; subjects NAT, SOC, LAN; contexts TXT (a hint), IMG, NO (neither); grades.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.evaluate.suites.question import (
    OPTION_LETTER,
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
)

TITLE, HEADLINE = "ScienceQA", "accuracy"
HEADLINE_PARTS = ("accuracy",)
MODES = ("llava", "lmms-eval")
SPLITS = ("test", "val", "train", "minitrain", "minival", "minitest")
FILES = "problems.json, pid_splits.json"
SCHEMA = "{pid: {question, choices, answer: index, hint, image: name or null, grade, subject}}"
SPLIT_SCHEMA = "{split: [pid, ...]}"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LLAVA_LETTERS = "ABCDE"


def read(folder: Path, split: str = "test", mode: str = "llava") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    path, listing = (published(folder, [name], TITLE) for name in ("problems.json", "pid_splits.json"))
    problems = load_json(path, TITLE, dict, SCHEMA)
    (pids,) = fields_of(load_json(listing, TITLE, dict, SPLIT_SCHEMA), [split], str(listing), SPLIT_SCHEMA)
    questions = []
    for pid in map(str, pids):
        if pid not in problems:
            raise ValueError(f"{listing} lists problem {pid} of {split}, which {path} lacks; both are of one release.")
        names = ["question", "choices", "answer", "hint", "image", "grade", "subject"]
        item = fields_of(problems[pid], names, f"problem {pid} of {path}", SCHEMA)
        text, choices, answer, hint, image, grade, subject = item
        if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(
                f"problem {pid} of {path} has answer {answer!r} of choices {choices!r}; expected {SCHEMA}."
            )
        context = [name for name, there in (("TXT", hint), ("IMG", image)) if there] or ["NO"]
        number = int(re.sub(r"\D", "", grade) or 0)
        groups = [f"subject/{_SUBJECTS.get(subject, subject)}", *(f"context/{name}" for name in context)]
        groups.append(f"grade/{'G1-6' if number <= 6 else 'G7-12'}")
        fields = {"question": text, "choices": choices, "groups": groups}
        disk = split if not split.startswith("mini") else {"minitrain": "train", "minival": "val"}.get(split, "test")
        places = (f"{disk}/{pid}/{image}", f"{pid}/{image}") if image else ()
        prompt = (_llava_prompt if mode == "llava" else _lmms_prompt)(text, choices, hint)
        questions.append(Question(pid, prompt + OPTION_LETTER, places, (LETTERS[answer],), fields))
    return questions


def _llava_prompt(text: str, choices: list[str], hint: str) -> str:
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(_LLAVA_LETTERS, choices, strict=False))
    context = hint.strip() or "N/A"
    return f"Context: {context}\nQuestion: {text}\nOptions: {options}\n".replace("  ", " ").strip()


def _lmms_prompt(text: str, choices: list[str], hint: str) -> str:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return (f"Context: {hint}\n" if hint else "") + f"{text}\n{options}"


def parse(said: str, choices: Sequence[str], mode: str) -> str:
    """The letter that is meant; "" if none of the choices is."""
    if mode == "lmms-eval":
        said = said.strip()
        if len(said) >= 2 and said[0].isupper() and said[1] == ".":
            return said[0]
        return said.upper() if len(said) == 1 else ""
    letter = ""
    if said in tuple(_LLAVA_LETTERS):
        letter = said
    elif len(said) >= 3 and said[0] in _LLAVA_LETTERS and said[1:3] == ". ":
        letter = said[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", said)
        letter = named[0] if len(named) == 1 else ""
    return letter if letter and letter in _LLAVA_LETTERS[: len(choices)] else ""


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    judged = []
    for question, said in zip(questions, predictions, strict=True):
        right = float(parse(said, question.fields["choices"], mode) == question.truths[0])
        image = ["IMG accuracy"] if question.images else []
        judged.append(Judged(right, counted(right, ["accuracy", *image, *question.fields["groups"]])))
    return judged


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    return means(sums)


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    """The result file of the official leaderboard: {pid: index}, -1 where no choice is meant, beside the raw outputs."""
    results, outputs = {}, {}
    for question, said in zip(questions, predictions, strict=True):
        letter = parse(said, question.fields["choices"], mode)
        results[question.id] = LETTERS.index(letter) if letter else -1
        outputs[question.id] = said
    return {"scienceqa_results.json": as_json({"results": results, "outputs": outputs})}


def max_tokens(mode: str) -> int:
    return 128 if mode == "llava" else 16
