"""Captions into Penn Treebank words, lower case, without punctuation: what the caption scores count.

`approximate` is pure Python: contractions split (isn't -> is n't, dog's -> dog 's, cannot -> can not), marks of
punctuation apart, hyphenated words, numbers, times and common abbreviations whole. `exact` asks Stanford's PTBTokenizer,
which needs Java and the jar that the package pycocoevalcap brings; scores made with the former are called approximate.
tests/test_captions.py compares the two where Java is there.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

JAR = "stanford-corenlp-3.4.1.jar"
DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

_ABBREVIATIONS = (
    "mr mrs ms dr prof st jr sr vs etc inc co corp ltd ave blvd rd mt ft no vol jan feb mar apr jun jul aug sep sept oct "
    "nov dec a.m p.m u.s u.k e.g i.e d.c"
).split()
_WHOLE = "|".join(re.escape(word) for word in sorted(_ABBREVIATIONS, key=len, reverse=True))
_PIECES = re.compile(
    rf"""
    (?P<web>(?:https?://|www\.)\S+?(?=[.,;:!?]*(?:\s|$)))
  | (?P<tail>n't\b|'(?:s|m|d|re|ve|ll)\b)
  | (?P<own>o'clock\b|'n'|(?<!\d)'\d\ds?\b|y'(?=all\b))
  | (?P<abbreviation>\b(?:{_WHOLE})\.(?=\s|$|,)|\b(?:[a-z]\.){{2,}}(?:[a-z]\b\.?)?)
  | (?P<number>\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?!\w))
  | (?P<word>\w+?(?=n't\b)|[^\W_]+(?:[-&_/.@][^\W_]+)*'?(?=n't\b)|\w+(?:[-&_/@.]\w+)*)
  | (?P<dots>\.\.+|--+)
  | (?P<mark>\S)
    """,
    re.VERBOSE,
)
_SPLIT: dict[str, tuple[str, ...]] = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
}
_SPLIT |= {"lemme": ("lem", "me"), "gimme": ("gim", "me")}
# Brackets stay: the published list of dropped words has them in capitals, and the text is lower case by then.
_BRACKETS: dict[str, str] = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_NOTHING = re.compile(r"[\"“”–—]|\.\.+|--+")


def approximate(captions: Sequence[str]) -> list[list[str]]:
    """The words of every caption, without Java."""
    return [_words(caption) for caption in captions]


def _words(caption: str) -> list[str]:
    text = caption.replace("\n", " ").replace("’", "'").replace("‘", "`").lower()
    words: list[str] = []
    for found in _PIECES.finditer(text):
        piece = found[0]
        words += _SPLIT.get(piece, (piece,))
    kept = (word for word in words if word not in DROPPED and not _NOTHING.fullmatch(word))
    return [_BRACKETS.get(word, word) for word in kept]


def exact(captions: Sequence[str]) -> list[list[str]]:
    """The words of every caption by Stanford's PTBTokenizer; ValueError where Java or the jar is missing."""
    java, jar = shutil.which("java"), find_jar()
    if java is None or jar is None:
        lack = "Java is not installed" if java is None else f"{JAR} of the package pycocoevalcap is not found"
        raise ValueError(
            f"exact caption scores need Java and Stanford's tokenizer, and {lack}. Install it (pip install "
            f"pycocoevalcap brings the jar), or use --mode approx, whose scores are named approximate."
        )
    lines = [" ".join(caption.split("\n")) for caption in captions]
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input="\n".join(lines).encode(), capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"Stanford's tokenizer failed: {done.stderr.decode(errors='replace')[-400:]}")
    tokenised = done.stdout.decode().split("\n")[: len(lines)]
    return [[word for word in line.split() if word not in DROPPED] for line in tokenised]


def find_jar() -> Path | None:
    """Where pycocoevalcap lies among the installed packages; it is not imported."""
    found = importlib.util.find_spec("pycocoevalcap")
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / "tokenizer" / JAR).is_file():
            return Path(place) / "tokenizer" / JAR
    return None
