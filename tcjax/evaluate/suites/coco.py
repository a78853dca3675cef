"""COCO captions (Chen et al. 2015): CIDEr-D, BLEU-1 to 4 and ROUGE-L x 100 against five people's captions.

    approx       tokenised without Java; the headline says so in its name
    ptb          tokenised by Stanford's PTBTokenizer as the published scores are (needs Java and pycocoevalcap's jar)
    lmms-eval    its prompt, and Stanford's tokenizer

Splits of Karpathy (dataset_coco.json) or the years' own (captions_val2014.json). Intervals keep the document frequencies
of the whole split. METEOR and SPICE need programs of their own and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.evaluate.suites import captions, ptb
from tcjax.evaluate.suites.captions import ORDERS
from tcjax.evaluate.suites.question import (
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

TITLE, HEADLINE = "COCO captions", "CIDEr-D"
HEADLINE_PARTS = ("CIDEr-D",)
MODES = ("approx", "ptb", "lmms-eval")
KARPATHY = {"karpathy-test": "test", "karpathy-val": "val", "karpathy-train": "train", "karpathy-restval": "restval"}
SPLITS = (*KARPATHY, "val2014", "train2014", "val2017", "train2017")
FILES = "dataset_coco.json (Karpathy's splits) or captions_<split>.json"
KARPATHY_SCHEMA = "{images: [{filepath, filename, cocoid, split, sentences: [{raw}, ...]}, ...]}"
SCHEMA = "{images: [{id, file_name}, ...], annotations: [{image_id, caption}, ...]}"
PROMPT = "Provide a one-sentence caption for the provided image."
BRIEFLY = "Describe the image briefly."


def read(folder: Path, split: str = "karpathy-test", mode: str = "approx") -> list[Question]:
    check_split(split, SPLITS, TITLE)
    prompt = BRIEFLY if mode == "lmms-eval" and split in KARPATHY else PROMPT
    rows = _karpathy(folder, KARPATHY[split]) if split in KARPATHY else _own(folder, split)
    for number, (_, truths) in rows.items():
        if not truths:
            raise ValueError(f"image {number} of {TITLE} {split} has no caption; expected are five.")
    return [
        Question(str(number), prompt, places, truths, {"question": prompt}) for number, (places, truths) in rows.items()
    ]


def _karpathy(folder: Path, part: str) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    path = published(folder, ["dataset_coco.json"], TITLE)
    rows = {}
    for item in listed(load_json(path, TITLE, dict, KARPATHY_SCHEMA), "images", path, KARPATHY_SCHEMA):
        names = ["filepath", "filename", "cocoid", "split", "sentences"]
        place, name, number, which, sentences = fields_of(item, names, f"an image of {path}", KARPATHY_SCHEMA)
        if which == part:
            where = f"a sentence of image {number} in {path}"
            raw = tuple(fields_of(one, ["raw"], where, KARPATHY_SCHEMA)[0] for one in sentences)
            rows[number] = ((f"{place}/{name}", name), raw)
    return rows


def _own(folder: Path, split: str) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    path = published(folder, [f"captions_{split}.json", f"annotations/captions_{split}.json"], TITLE)
    content = load_json(path, TITLE, dict, SCHEMA)
    said: dict[int, list[str]] = {}
    for item in listed(content, "annotations", path, SCHEMA):
        number, caption = fields_of(item, ["image_id", "caption"], f"an annotation of {path}", SCHEMA)
        said.setdefault(number, []).append(caption)
    rows = {}
    for item in listed(content, "images", path, SCHEMA):
        number, name = fields_of(item, ["id", "file_name"], f"an image of {path}", SCHEMA)
        rows[number] = ((f"{split}/{name}", name), tuple(said.get(number, ())))
    return rows


def judge(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> list[Judged]:
    tokenise = ptb.approximate if mode == "approx" else ptb.exact
    words = iter(tokenise([*predictions, *(truth for question in questions for truth in question.truths)]))
    said = [next(words) for _ in predictions]
    references = [[next(words) for _ in question.truths] for question in questions]
    judged = []
    for hyp, refs, cider in zip(said, references, captions.cider_d(said, references), strict=True):
        parts = counted(cider, ["CIDEr-D"]) | counted(captions.rouge_l(hyp, refs), ["ROUGE-L"])
        counts = captions.bleu_counts(hyp, refs)
        parts |= {"BLEU length": float(counts.length), "BLEU reference": float(counts.reference)}
        for n in range(ORDERS):
            parts |= {f"BLEU right {n + 1}": float(counts.right[n]), f"BLEU said {n + 1}": float(counts.said[n])}
        judged.append(Judged(cider, parts))
    return judged


def metrics(sums: Sums, mode: str) -> dict[str, Any]:
    found = means(sums)
    if "BLEU length" in sums:
        right, wrong = ([sums[f"BLEU {what} {n + 1}"] for n in range(ORDERS)] for what in ("right", "said"))
        counts = captions.BleuCounts(tuple(right), tuple(wrong), sums["BLEU length"], sums["BLEU reference"])
        found |= {f"BLEU-{n}": 100 * score for n, score in enumerate(captions.bleu(counts), 1)}
    return found


def submission(questions: Sequence[Question], predictions: Sequence[str], mode: str) -> dict[str, bytes]:
    pairs = zip(questions, predictions, strict=True)
    return {"captions_results.json": as_json([{"image_id": int(q.id), "caption": said} for q, said in pairs])}


def max_tokens(mode: str) -> int:
    return 64
