"""TextVQA 0.5.1 (Singh et al. 2019): questions about text in photographs; soft accuracy x 100, m4c's normalisation.

    official     the question and the short-answer suffix
    llava        the OCR tokens that were published beside the questions stand in the prompt; its 58.2 assumes them
    lmms-eval    the question with a capital first letter, no OCR tokens

Mode llava reads LLaVA's own question file where it lies in the folder, else the published Rosetta OCR tokens.
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
    load_lines,
    means,
    published,
)
from tcjax.evaluate.suites.soft_accuracy import normalise, soft_accuracy

TITLE, HEADLINE = "TextVQA", "accuracy"
HEADLINE_PARTS = ("accuracy",)
MODES = ("official", "llava", "lmms-eval")
SPLITS = ("val", "train", "test")
FILES = "TextVQA_0.5.1_<split>.json; mode llava also llava_textvqa_val_v051_ocr.jsonl or TextVQA_Rosetta_OCR_v0.2_<split>.json"
SCHEMA = "{data: [{question, question_id, image_id, answers: [10 strings]}, ...]}"
OCR_SCHEMA = "{data: [{image_id, ocr_tokens: [strings]}, ...]}"
LINES = "lines of {question_id (the image's), image, text (question, 'Reference OCR token: ...', suffix)}"


def read(folder: Path, split: str = "val", mode: str = "official") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    path = published(folder, [f"TextVQA_0.5.1_{split}.json"], TITLE)
    prompts, tokens = _ocr(folder, split) if mode == "llava" else ({}, {})
    questions, photos = [], "test_images" if split == "test" else "train_images"
    for item in listed(load_json(path, TITLE, dict, SCHEMA), "data", path, SCHEMA):
        text, number, image = fields_of(item, ["question", "question_id", "image_id"], f"a question of {path}", SCHEMA)
        if mode == "lmms-eval":
            prompt = text.capitalize() + SHORT_ANSWER
        elif mode == "llava" and prompts:
            if (image, text.lower()) not in prompts:
                raise ValueError(
                    f"LLaVA's question file lacks question {number} of {path}; both must be version 0.5.1."
                )
            prompt = prompts[image, text.lower()]
        elif mode == "llava":
            prompt = f"{text}\nReference OCR token: {', '.join(tokens.get(image, []))}{SHORT_ANSWER}"
        else:
            prompt = text + SHORT_ANSWER
        truths = tuple(item.get("answers", ()))
        if not truths and split != "test":
            raise ValueError(f"question {number} of {path} has no answers; expected is {SCHEMA}.")
        places = (f"{photos}/{image}.jpg", f"{image}.jpg")
        questions.append(Question(str(number), prompt, places, truths, {"question": text, "image_id": image}))
    return questions


def _ocr(folder: Path, split: str) -> tuple[dict[tuple[str, str], str], dict[str, list[str]]]:
    """LLaVA's prompts by image and question, or else the OCR tokens of every image."""
    names = ["llava_textvqa_val_v051_ocr.jsonl"] if split == "val" else []
    path = published(folder, [*names, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"], f"{TITLE} in mode llava")
    if path.suffix == ".jsonl":
        prompts = {}
        for line in load_lines(path, TITLE, LINES):
            image, text = fields_of(line, ["question_id", "text"], f"a line of {path}", LINES)
            prompts[image, text.partition("\n")[0].lower()] = text
        return prompts, {}
    items = listed(load_json(path, TITLE, dict, OCR_SCHEMA), "data", path, OCR_SCHEMA)
    pairs = [fields_of(item, ["image_id", "ocr_tokens"], f"an image of {path}", OCR_SCHEMA) for item in items]
    return {}, {str(image): list(tokens) for image, tokens in pairs}


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    pairs = zip(questions, predictions, strict=True)
    scores = [soft_accuracy(said, question.truths, "m4c") for question, said in pairs]
    return [Judged(score, counted(score, ["accuracy"])) for score in scores]


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    return means(sums)


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    pairs = zip(questions, predictions, strict=True)
    rows = [{"question_id": int(question.id), "answer": normalise(said, "m4c")} for question, said in pairs]
    return {"textvqa_submission.json": as_json(rows)}


def max_tokens(mode: str) -> int:
    return 128 if mode == "llava" else 16
