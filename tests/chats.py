"""The golden conversations of tests/golden/chat and the small tokenizers they are written with."""

import gzip
import importlib.util
import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from tcjax.pipeline import sentencepiece
from tcjax.pipeline.sample import Turn
from tcjax.pipeline.tokenizer import load_tokenizer

FOLDER = Path(__file__).parent / "golden/chat"
MODEL = FOLDER / "tokenizer.model"
IMAGE = -200  # LLaVA's id where an image stands


def _corpus():
    spec = importlib.util.spec_from_file_location("corpus", FOLDER / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CORPUS = _corpus()


@cache
def golden() -> dict:
    """What the published code gave; see tests/golden/chat/README.md."""
    return json.loads(gzip.decompress((FOLDER / "golden.json.gz").read_bytes()))


@cache
def tokenizer(kind: str) -> Tokenizer:
    """legacy, new: Llama's two behaviours behind a special token. bytes: byte-level, with the marks of Qwen and Llama 3."""
    if kind == "bytes":
        return load_tokenizer(FOLDER / "bytes.json")
    return sentencepiece.tokenizer(MODEL, legacy=kind == "legacy")


def samples(num: int, several: bool = False) -> list[tuple[int, list[Turn]]]:
    """(number of images, turns) of the golden conversations. several: those with an image in every turn."""
    found = []
    for sample in CORPUS.several(num) if several else CORPUS.conversations(num):
        said = [message["value"] for message in sample["conversations"]]
        turns = [Turn(*pair) for pair in zip(said[::2], said[1::2], strict=True)]
        found.append((len(turns) if several else int("image" in sample), turns))
    return found


def as_golden(ids, is_image, supervised) -> tuple[list[int], list[bool]]:
    return [IMAGE if image else i for i, image in zip(ids, is_image, strict=True)], list(supervised)


def of_golden(row: dict) -> tuple[list[int], list[bool]]:
    supervised = [False] * len(row["ids"])
    for first, past in row["supervised"]:
        supervised[first:past] = [True] * (past - first)
    return row["ids"], supervised
