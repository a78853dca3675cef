"""Published turns -> `Turn`s, strictly: what peers guess at or drop without a word is refused with file, row and id.

    [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A bus."}]  ->  [Turn("<image>\\nWhat?", "A bus.")]

Rules: human and gpt alternate, human first, an even number of turns; every answer has a word; `<image>` marks stand in
questions only, as many as the sample has images. One system turn may come first: it is kept in `fields["system"]` and not
trained on, as the template brings its own system sentence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tcjax.pipeline.sample import BadSample, Turn

MARK = "<image>"

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class Row(NamedTuple):
    """Whose turns these are. where: file and row, for messages."""

    where: str
    image_id: str

    def bad(self, kind: str, reason: str) -> BadSample:
        return BadSample(self.image_id, f"{self.where}: {reason}", kind)


def spoken(row: Row, conversations: Any) -> tuple[list[Turn], dict[str, Any]]:
    """A `conversations` list -> turns, and {"system": text} where it opens with one."""
    if not isinstance(conversations, list) or not conversations:
        raise row.bad("schema", f"'conversations' must be a list of turns, not {_short(conversations)}")
    said = [_message(row, i, message) for i, message in enumerate(conversations)]
    fields = {}
    if said[0][0] == "system":
        fields["system"] = said.pop(0)[1]
    roles = [role for role, _ in said]
    if "system" in roles:
        raise row.bad("turns", "a system turn may only come first")
    if roles and roles[0] != "human":
        raise row.bad("turns", "the first turn is gpt's; a conversation starts with human")
    for i in range(1, len(roles)):
        if roles[i] == roles[i - 1]:
            raise row.bad("turns", f"turns {i} and {i + 1} are both {roles[i]}'s; human and gpt alternate")
    if not roles or len(roles) % 2:
        raise row.bad("turns", f"{len(roles)} turns: an odd number leaves a question without an answer")
    texts = [text for _, text in said]
    return [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)], fields


def checked(row: Row, turns: list[Turn], num_images: int, *, marks_needed: bool = False) -> list[Turn]:
    """The turns, if every answer has a word and the `<image>` marks fit the images.

    marks_needed: no mark at all is wrong, too, where there are images; otherwise they then come before the first turn.
    """
    if not turns:
        raise row.bad("turns", "it has no turn")
    for i, turn in enumerate(turns, 1):
        if not (_whole(turn.question) and _whole(turn.answer)):
            raise row.bad("schema", f"turn {i} holds half a character (a lone surrogate)")
        if not turn.answer.strip():
            raise row.bad("empty_answers", f"the answer of turn {i} is empty")
        if MARK in turn.answer:
            raise row.bad("image_marks", f"the answer of turn {i} holds {MARK}; marks stand in questions")
    marks = sum(turn.question.count(MARK) for turn in turns)
    if marks != num_images and (marks or marks_needed):
        raise row.bad("image_marks", f"{marks} {MARK} marks for {num_images} images")
    return turns


def _message(row: Row, i: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not {"from", "value"} <= set(message):
        raise row.bad("schema", f"turn {i + 1} must be {{'from', 'value'}}, not {_short(message)}")
    role, text = message["from"], message["value"]
    if role not in ROLES:
        raise row.bad("turns", f"turn {i + 1} is from {role!r}; possible: {sorted(ROLES)}")
    if not isinstance(text, str):
        raise row.bad("schema", f"the value of turn {i + 1} is {_short(text)}, not text")
    return ROLES[role], text


def _whole(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON's \\ud83d alone, half of an emoji, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
