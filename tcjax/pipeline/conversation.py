"""A conversation and a template -> pieces of text in order, and which of them are tokenised in one pass. No tokenizer here.

`<image>` in a published question is a mark, never text. Where no question has any, a record's images belong to its first turn.
A question that loses a mark is stripped, as LLaVA does: "What is it?\\n<image>" is one image and "What is it?".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from tcjax.config import Template
from tcjax.pipeline.sample import BadSample, Turn

MARK = "<image>"


class BadConversation(BadSample):
    """A sample that cannot be trained on; the message says why."""

    def __init__(self, image_id: str, message: str):
        ValueError.__init__(self, message)
        self.image_id, self.kind = image_id, "image_marks"


class Unsupervised(BadConversation):
    """A sample of which nothing would be learned: no answer fits, or one is empty."""


class Piece(NamedTuple):
    """A string with one meaning. turn: 0 for what all turns share, then 1, 2, ... said: from lead to end.

    side: pieces of one message have the same number.
    """

    text: str
    turn: int
    side: int
    image: bool = False
    said: bool = False
    supervised: bool = False


def images_by_turn(questions: Sequence[str], num_images: int, name: str = "") -> list[int]:
    """How many of a sample's images each question shows; BadConversation if its marks are not as many as its images."""
    marks = [question.count(MARK) for question in questions]
    if not questions:
        return []
    if not sum(marks):
        return [num_images, *marks[1:]]
    if sum(marks) != num_images:
        raise BadConversation(
            name,
            f"sample {name!r} has {sum(marks)} {MARK} marks and {num_images} images; there must be one mark per image, or "
            f"none at all.",
        )
    return marks


def pieces(
    template: Template, turns: Sequence[Turn], num_images: int, *, asking: bool = False, name: str = ""
) -> list[Piece]:
    """What is written behind the begin mark, in order; pieces without text are left out.

    Args:
        asking: the last turn's answer is not known: end behind its assistant mark.

    Raises:
        BadConversation: marks and images differ, an answer holds a mark or is empty, or a caption has several turns.
    """
    shown = images_by_turn([turn.question for turn in turns], num_images, name)
    if not template.question and len(turns) > 1:
        raise BadConversation(
            name,
            f"sample {name!r} has {len(turns)} turns, and a template without questions takes one caption; choose another "
            f"template.",
        )
    found: list[Piece] = []
    if template.place == "begin":
        found += [piece for _ in range(sum(shown)) for piece in _image(template, 0, 0)]
        found += [Piece(template.image_gap, 0, 0)] * bool(sum(shown))
    found.append(Piece(template.system, 0, 0))
    for number, (turn, images) in enumerate(zip(turns, shown, strict=True), 1):
        asked = _asked(template, turn.question, images, number)
        if number == 1:  # what stands before the first turn's images is shared with them
            last = max((i for i, piece in enumerate(asked) if piece.image), default=-1)
            asked = [piece._replace(turn=0) for piece in asked[: last + 1]] + asked[last + 1 :]
        found += asked
        side = 2 * number - 1
        found.append(Piece(template.assistant, number, side - 1, supervised=template.supervise_assistant))
        if not (asking and number == len(turns)):
            found += _said(template, turn.answer, number, name)
    return [piece for piece in found if piece.text or piece.image]


def passes(template: Template, found: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in groups, each tokenised in one pass; an image is a group of its own unless all is one."""
    if template.passes == "whole":
        return [list(found)] if found else []
    groups: list[list[Piece]] = []
    for is_image, run in groupby(found, key=lambda piece: piece.image):
        if is_image or template.passes == "span":
            groups += [[piece] for piece in run]
        elif template.passes == "message":
            groups += [list(message) for _, message in groupby(run, key=lambda piece: piece.side)]
        else:
            groups.append(list(run))
    return groups


def _asked(template: Template, question: str, images: int, number: int) -> list[Piece]:
    """One user message: marks, images and the question."""
    side = 2 * (number - 1)

    def text(value: str) -> Piece:
        return Piece(value, number, side)

    start = [
        text(template.again if number > 1 else ""),
        text(template.user),
        text(template.first if number == 1 else ""),
    ]
    image, marked = _image(template, number, side), MARK in question
    parts = question.split(MARK) if marked else [""] * images + [question]
    bare = "".join(parts)
    bare = bare.strip() if marked or template.strip else bare
    if not template.question:
        written = [*start, *(image * images if template.place != "begin" else [])]
    elif template.place == "begin":
        written = [*start, text(bare)]
    elif template.place == "message":
        written = [
            piece for part in parts for piece in (*image, *(start + [text(part.strip())] if part.strip() else []))
        ]
        written = written[len(image) :] if bare else [*written[len(image) :], *start]
    elif template.place == "mark" or question.count(MARK) > 1:
        written = [piece for part in parts for piece in (*image, text(part))]
        written = [*start, *written[len(image) :]]
    else:
        gap = text(template.image_gap if bare else template.image_gap.rstrip())
        written = [*start, *[*image, gap] * images, text(bare)]
    return [*written, text(template.close)]


def _said(template: Template, answer: str, number: int, name: str) -> list[Piece]:
    if MARK in answer:
        raise BadConversation(
            name, f"sample {name!r}: the answer of turn {number} holds {MARK}; only questions show images."
        )
    answer = answer.strip() if template.strip else answer
    if not answer.strip():
        raise Unsupervised(
            name, f"sample {name!r}: the answer of turn {number} is empty; remove the turn or the sample."
        )
    texts = (template.lead, answer, template.end)
    return [Piece(text, number, 2 * number - 1, said=True, supervised=True) for text in texts]


def _image(template: Template, number: int, side: int) -> list[Piece]:
    around = (Piece(template.image_before, number, side), Piece(template.image_after, number, side))
    return [around[0], Piece(template.image, number, side, image=True), around[1]]
