"""VQA soft accuracy: how many of ten people gave this answer, three of the other nine being enough.

    score = mean over the ten answers of min(1, matches among the other nine / 3)

1, 2, 3, 4 matching answers of ten give .3, .6, .9, 1. What counts as the same answer is decided by normalising text, and
there are several ways to do it (`DIALECTS`), differing where scores differ:

    official     Antol et al. 2015: nothing is normalised where all ten answers are one string, so "Yes" against ten
                 "yes" scores 0. A full stop goes unless a digit follows it (its pattern's look-behind is misplaced, and
                 the flag is passed as a count: at most 32 go)
    always       the same text, normalised always (lmms-eval)
    m4c          lower case first, no commas and question marks, 's a word of its own, then as always (LLaVA on TextVQA)
    vlmevalkit   as always with the look-behind repaired: a full stop after a digit stays

Each is checked against the original code's answers in tests/test_suites_oracles.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

DIALECTS = ("official", "always", "m4c", "vlmevalkit")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = {"official": r"\d,\d", "always": r"\d,+\d", "m4c": r"\d,+\d", "vlmevalkit": r"\d,\d"}
_STOP = {"vlmevalkit": re.compile(r"(?<!\d)\.(?!\d)")}
_ANY_STOP = re.compile(r"\.(?!\d)")
_STOPS = 32  # re.UNICODE, passed where a count belongs
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
}
_ARTICLES = ("a", "an", "the")

# Each is reached from its spelling without apostrophes. Entries with a capital I never match lower-case text.
_CONTRACTED = """
'twas ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're
they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've
why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
# Reached from the spellings that lack one apostrophe, each of them in turn.
_TWICE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've 'ow's'at y'all'd've
""".split()


def _contractions() -> dict[str, str]:
    table = {form.replace("'", ""): form for form in _CONTRACTED}
    for form in _TWICE:
        marks = [place for place, letter in enumerate(form) if letter == "'"]
        table |= {form[:place] + form[place + 1 :]: form for place in marks}
    # Two of the published table's own: y'all'll lacks a third spelling, and somebody'd is the wrong way round.
    return table | {"yall'll": "y'all'll", "y'allll": "y'all'll", "somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


def flat(text: str) -> str:
    """Line breaks and tabs become spaces; none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str, dialect: str = "always") -> str:
    """What two answers must agree in. "The Red Car" -> "red car"; "1,000" -> "1000"; "dont" -> "don't"."""
    if dialect == "m4c":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    plain = without_punctuation(flat(text), dialect)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str, dialect: str = "vlmevalkit") -> str:
    """A mark goes if a space is beside one of its kind, or a comma between digits anywhere; else it becomes a space."""
    joined = re.search(_DIGIT_COMMA[dialect], text) is not None
    plain = text
    for mark in _PUNCTUATION:
        goes = joined or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if goes else " ")
    return _STOP.get(dialect, _ANY_STOP).sub("", plain, count=_STOPS)


def soft_accuracy(prediction: str, answers: Sequence[str], dialect: str) -> float:
    """The score in [0, 1] of one prediction against the people's answers, ten as a rule."""
    same: Callable[[str], str] = lambda text: normalise(text, dialect)  # noqa: E731
    if dialect == "official":
        answers = [flat(answer) for answer in answers]
        if len(set(answers)) == 1:
            same = flat
    said, given = same(prediction), [same(answer) for answer in answers]
    matches = given.count(said)
    each = [min(1.0, (matches - (answer == said)) / 3) for answer in given]
    return sum(each) / len(each)
