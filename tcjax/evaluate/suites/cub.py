"""CUB-200-2011 (Wah et al. 2011): which of 200 birds is it? Top-1 accuracy x 100.

There is no standard prompt for language models. We ask SPECIES and take the class name with the largest
length-normalised log-likelihood: the mean log-probability of its tokens after the prompt (`tcjax/evaluate/likelihood.py`).
Scores of other prompts, or of generated names, are other figures.
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
    check_split,
    counted,
    means,
    published,
)

TITLE, HEADLINE = "CUB-200-2011", "accuracy"
HEADLINE_PARTS = ("accuracy",)
MODES = ("likelihood",)
SPLITS = ("test", "train")
FILES = "classes.txt, images.txt, image_class_labels.txt, train_test_split.txt"
SPECIES = "What species of bird is in the image?" + SHORT_ANSWER


def read(folder: Path, split: str = "test", mode: str = "likelihood") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    classes = {number: _name(text) for number, text in _table(folder, "classes.txt", "class name").items()}
    images = _table(folder, "images.txt", "id path")
    labels = _table(folder, "image_class_labels.txt", "id class")
    train = _table(folder, "train_test_split.txt", "id is_train")
    choices = tuple(classes.values())
    questions = []
    for number, path in images.items():
        if number not in labels or number not in train or labels[number] not in classes:
            raise ValueError(f"image {number} of {folder}/images.txt has no class or no split in the other tables.")
        if (train[number] == "1") == (split == "train"):
            truth = classes[labels[number]]
            fields = {"question": SPECIES, "class": truth, "path": path}
            questions.append(Question(number, SPECIES, (f"images/{path}", path), (truth,), fields, choices))
    return questions


def _name(text: str) -> str:
    """ "001.Black_footed_Albatross" -> "Black footed Albatross"."""
    return text.partition(".")[2].replace("_", " ") or text


def _table(folder: Path, name: str, columns: str) -> dict[str, str]:
    path, rows = published(folder, [name], TITLE), {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split()
        if len(cells) != 2:
            raise ValueError(f"line {number} of {path} is {line!r}; expected are two columns, {columns}.")
        rows[cells[0]] = cells[1]
    return rows


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    judged = []
    for question, said in zip(questions, predictions, strict=True):
        right = float(said == question.truths[0])
        judged.append(Judged(right, counted(right, ["accuracy", f"class/{question.fields['class']}"])))
    return judged


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    found = means(sums)
    classes = [value for name, value in found.items() if name.startswith("class/")]
    return found | ({"mean over classes": sum(classes) / len(classes)} if classes else {})


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    """Lines of image id, path and predicted class, in the style of the dataset's own tables."""
    rows = [
        f"{q.id} {q.fields['path']} {said.replace(' ', '_')}" for q, said in zip(questions, predictions, strict=True)
    ]
    return {"cub_predictions.txt": ("\n".join(rows) + "\n").encode()}


def max_tokens(mode: str) -> int:
    return 0
