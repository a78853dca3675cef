"""A conversation and Q -> tokens_S, is_image_S, supervised_S, valid_S. S = Q + text_length.

    <bos> <image> x Q   <user> question <assistant> answer <end>   <user> question <assistant> answer <end>  ...
                                                    ~~~~~~~~~~~~                               ~~~~~~~~~~~~ supervised

Ids are the concatenation of spans encoded one by one: the mask is exact because nothing is found again by searching
re-tokenised text. `text_length` covers everything but the Q image positions. A longer conversation loses whole
trailing turns, never image positions and never half an answer; `Rendered.dropped` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from tcjax.config import Template
from tcjax.pipeline.sample import Turn


class BadConversation(ValueError):
    """A sample that cannot be trained on; the message names it."""


class Unsupervised(BadConversation):
    """No answer of a conversation fits: there would be nothing to learn from it."""


class Composed(NamedTuple):
    """A conversation as ids, not padded. turn: 0 for begin mark and image, then 1, 2, ... per turn.

    num_images: whose Q positions each are among the ids. dropped: turns that did not fit.
    instruction: ids of the kept turns' questions alone, without marks, one after another.
    truncated: tokens cut off the end of an answer.
    """

    ids: list[int]
    is_image: list[bool]
    supervised: list[bool]
    turn: list[int]
    num_images: int
    dropped: int = 0
    instruction: tuple[int, ...] = ()
    truncated: int = 0


class Rendered(NamedTuple):
    """One row of a Batch. segment_S: 0 for begin mark and image, then 1, 2, ... per turn. dropped: turns that did not fit.

    instruction: ids of the kept turns' questions alone, without marks, one after another.
    """

    tokens_S: np.ndarray
    is_image_S: np.ndarray
    supervised_S: np.ndarray
    valid_S: np.ndarray
    segment_S: np.ndarray
    dropped: int = 0
    instruction: tuple[int, ...] = ()


def fitted(instruction: Sequence[int], length: int) -> np.ndarray:
    """int32 instruction_T for `Batch.instruction_BT`: -1 after its end; a longer one loses its beginning, as in LAVIS."""
    kept = list(instruction)[-length:]
    return np.array(kept + [-1] * (length - len(kept)), np.int32)


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json of the `tokenizers` library."""
    if not Path(path).is_file():
        raise ValueError(f"no tokenizer at {path}; DataConfig.tokenizer names a tokenizer.json below the project root.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error


class Chat:
    """A tokenizer with a template: renders conversations for training and single questions for evaluation."""

    def __init__(self, tokenizer: Tokenizer, template: Template = Template()):
        self.tokenizer, self.template = tokenizer, template
        self.image_id, self.pad_id = self._single("image"), self._single("pad")
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
        self.encode = lru_cache(maxsize=1 << 16)(self._encode)  # questions and short answers repeat
        self._begin = self.encode(template.begin) if template.begin else ()
        self._user, self._assistant = self.encode(template.user), self.encode(template.assistant)
        self._end = self.encode(template.end)
        if not self._end:
            raise ValueError("Template.end is empty; answers need an end mark that generation can stop at.")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What closes an answer; generation stops here."""
        return self._end

    def compose(
        self, turns: Sequence[Turn], *, num_queries: int, text_length: int, num_images: int = 1, name: str = ""
    ) -> Composed:
        """A conversation as it is trained on; every answer is supervised together with its end mark.

        Args:
            num_queries: Q, positions per image; 0 leaves the images out.
            text_length: the most positions beside those of images.
            num_images: of the sample; 0 is text alone.
            name: of the sample, for error messages.

        Raises:
            Unsupervised: no answer fits into `text_length`.
            ValueError: a word is unknown to the tokenizer.
        """
        ids, supervised, kept = list(self._begin), [False] * len(self._begin), 0
        turn, instruction = [0] * len(self._begin), ()
        for question, answer in turns:
            asked = self._question(question)
            said = (*self.encode(answer), *self._end)
            if len(ids) + len(asked) + len(said) > text_length:
                break
            ids += [*asked, *said]
            supervised += [False] * len(asked) + [True] * len(said)
            kept += 1
            instruction += self.instruction(question)
            turn += [kept] * (len(asked) + len(said))
        if not kept:
            raise Unsupervised(
                f"sample {name!r} has {len(turns)} turns and none fits: no supervised token within "
                f"text_length={text_length}. Raise DataConfig.text_length or drop the sample."
            )
        start, visual = len(self._begin), num_queries * num_images
        return Composed(
            ids[:start] + [self.image_id] * visual + ids[start:],
            [False] * start + [True] * visual + [False] * (len(ids) - start),
            supervised[:start] + [False] * visual + supervised[start:],
            turn[:start] + [0] * visual + turn[start:],
            num_images,
            len(turns) - kept,
            instruction,
        )

    def render(self, turns: Sequence[Turn], *, num_queries: int, text_length: int, name: str = "") -> Rendered:
        """A training row of one conversation with its image, right-padded to Q + text_length; raises as `compose`."""
        row = self.compose(turns, num_queries=num_queries, text_length=text_length, name=name)
        S, end = num_queries + text_length, len(row.ids)
        tokens_S, supervised_S = np.full(S, self.pad_id, np.int32), np.zeros(S, bool)
        is_image_S, valid_S, segment_S = np.zeros(S, bool), np.zeros(S, bool), np.zeros(S, np.int32)
        tokens_S[:end], supervised_S[:end], is_image_S[:end] = row.ids, row.supervised, row.is_image
        valid_S[:end], segment_S[:end] = True, row.turn
        return Rendered(tokens_S, is_image_S, supervised_S, valid_S, segment_S, row.dropped, row.instruction)

    def render_question(self, question: str, *, num_queries: int) -> list[int]:
        """Prompt ids up to and including the assistant mark, image placeholders included."""
        return [*self._begin, *[self.image_id] * num_queries, *self._question(question)]

    def instruction(self, question: str) -> tuple[int, ...]:
        """The question's ids alone: what may condition a compressor."""
        return self.encode(question)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """What a right model generates: the answer and its end mark."""
        return (*self.encode(answer), *self._end)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the first end mark, special tokens left out."""
        ids = [int(i) for i in ids]
        width = len(self._end)
        ends = (i for i in range(len(ids) - width + 1) if tuple(ids[i : i + width]) == self._end)
        return self.tokenizer.decode(ids[: next(ends, len(ids))], skip_special_tokens=True).strip()

    def unknown_words(self, text: str) -> list[str]:
        """The pieces of `text` that this tokenizer has no id for."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[first:past] for token, (first, past) in found if token == self._unknown_id]

    def _question(self, question: str) -> tuple[int, ...]:
        return (*self._user, *self.encode(question), *self._assistant)

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if self._unknown_id is not None and self._unknown_id in ids:
            raise ValueError(
                f"the tokenizer has no id for {self.unknown_words(text)} in {text!r}; "
                f"use the tokenizer the dataset was made for, or add the words."
            )
        return ids

    def _single(self, field: str) -> int:
        text = getattr(self.template, field)
        found = self.tokenizer.token_to_id(text)
        if found is None:
            raise ValueError(
                f"Template.{field}={text!r} is not one token of the tokenizer; add it to the tokenizer or name a "
                f"reserved token it has."
            )
        return found
