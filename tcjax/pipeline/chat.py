"""A conversation and Q -> tokens_S, is_image_S, supervised_S, valid_S. S = Q + text_length.

    <bos> <image> x Q   <user> question <assistant> answer <end>   <user> question <assistant> answer <end>  ...
                                                    ~~~~~~~~~~~~                               ~~~~~~~~~~~~ supervised

The strings between are the template's (tcjax.config.Template). The mask is exact because every text is tokenised once, and
a token is supervised if any of its characters is: nothing is found again by searching or counting re-tokenised text.
`text_length` covers everything but the images' positions. A longer conversation loses whole trailing turns (`dropped`); a
first turn that is too long alone loses the end of its answer (`truncated`), never of its question and never an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from tcjax.config import Template
from tcjax.pipeline.conversation import MARK, BadConversation, Piece, Unsupervised, images_by_turn, passes, pieces
from tcjax.pipeline.sample import Turn
from tcjax.pipeline.tokenizer import Marks, load_tokenizer, read_marks

__all__ = ["BadConversation", "Chat", "Composed", "Rendered", "Unsupervised", "fitted", "load_tokenizer", "open_chat"]


class Composed(NamedTuple):
    """A conversation as ids, not padded. turn: 0 for what all turns share (up to the first turn's images), then 1, 2, ...

    num_images: whose Q positions each are among the ids, the sample's first ones. dropped: turns that did not fit.
    instruction: ids of the kept turns' questions alone, without marks, one after another.
    truncated: tokens cut off the end of a first answer that does not fit alone.
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
    """One row of a Batch. segment_S: `Composed.turn`. dropped, instruction, truncated: as there."""

    tokens_S: np.ndarray
    is_image_S: np.ndarray
    supervised_S: np.ndarray
    valid_S: np.ndarray
    segment_S: np.ndarray
    dropped: int = 0
    instruction: tuple[int, ...] = ()
    truncated: int = 0


class _Token(NamedTuple):
    id: int
    turn: int
    image: bool = False
    said: bool = False
    supervised: bool = False


def fitted(instruction: Sequence[int], length: int) -> np.ndarray:
    """int32 instruction_T for `Batch.instruction_BT`: -1 after its end; a longer one loses its beginning, as in LAVIS."""
    kept = list(instruction)[-length:]
    return np.array(kept + [-1] * (length - len(kept)), np.int32)


def open_chat(path: Path, template: Template = Template()) -> Chat:
    """The tokenizer of a file or of a checkpoint's folder, with a template."""
    tokenizer = load_tokenizer(path)
    return Chat(tokenizer, template, read_marks(path, tokenizer))


class Chat:
    """A tokenizer with a template: renders conversations for training and single questions for evaluation.

    image_id: what stands at image positions; `Composed.is_image` alone says which those are. pad_id: behind the end.
    stop_ids: single ids at which a generation ends; () if the end is several tokens and the files name none.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template = Template(), marks: Marks = Marks()):
        self.tokenizer, self.template = tokenizer, template
        self._plain = _without_post_processor(tokenizer)
        unknown = (
            None if getattr(tokenizer.model, "byte_fallback", False) else getattr(tokenizer.model, "unk_token", None)
        )
        self._unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
        self.encode = lru_cache(maxsize=1 << 16)(self._encode)  # questions and short answers repeat
        if not template.end:
            raise ValueError("Template.end is empty; answers need an end mark that generation can stop at.")
        self.pad_id = self._single("pad") if template.pad else self._pad_of(marks)
        self.image_id = self._single("image") if template.image else self.pad_id
        self._begin = self.encode(template.begin) if template.begin else ()
        self._end = self._behind_answer(template.end)
        stop = self._behind_answer(template.stop) if template.stop else self._end
        self.stop_ids = tuple(dict.fromkeys((*(stop if len(stop) == 1 else ()), *marks.end_ids)))
        self._everywhere = {i for text in template.everywhere for i in self._learned_everywhere(text)}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What closes an answer."""
        return self._end

    def compose(
        self, turns: Sequence[Turn], *, num_queries: int, text_length: int, num_images: int = 1, name: str = ""
    ) -> Composed:
        """A conversation as it is trained on; every answer is supervised together with its end mark.

        Args:
            num_queries: Q, positions per image; 0 leaves the images out.
            text_length: the most positions beside those of images.
            num_images: of the sample; 0 is text alone. Images of turns that do not fit are dropped with them.
            name: of the sample, for error messages.

        Raises:
            Unsupervised: no answer token fits into `text_length`, or an answer is empty.
            BadConversation: image marks and images differ, or an answer holds a mark.
            ValueError: a word is unknown to the tokenizer.
        """
        shown = images_by_turn([turn.question for turn in turns], num_images, name)
        kept, tokens = len(turns), self._tokens(pieces(self.template, turns, num_images, name=name))
        while kept > 1 and _text(tokens) > text_length:
            kept = max((n for n in range(1, kept) if _text(tokens, n) <= text_length), default=1)
            tokens = self._tokens(pieces(self.template, turns[:kept], sum(shown[:kept]), name=name))
        over = max(0, _text(tokens) - text_length)
        tokens = tokens[: len(tokens) - over]  # of the answer; where that does not do, the next check speaks
        if not any(token.said for token in tokens):
            raise Unsupervised(
                name,
                f"sample {name!r} has {len(turns)} turns and none fits: no supervised token within "
                f"text_length={text_length}. Raise DataConfig.text_length or drop the sample.",
            )
        instruction = tuple(i for turn in turns[:kept] for i in self.instruction(turn.question))
        dropped = len(turns) - kept
        return self._spread(tokens, num_queries, sum(shown[:kept]), dropped, instruction, over)

    def render(
        self, turns: Sequence[Turn], *, num_queries: int, text_length: int, num_images: int = 1, name: str = ""
    ) -> Rendered:
        """A training row of one conversation, right-padded to Q per image + text_length; raises as `compose`."""
        row = self.compose(turns, num_queries=num_queries, text_length=text_length, num_images=num_images, name=name)
        S, end = num_queries * num_images + text_length, len(row.ids)
        tokens_S, supervised_S = np.full(S, self.pad_id, np.int32), np.zeros(S, bool)
        is_image_S, valid_S, segment_S = np.zeros(S, bool), np.zeros(S, bool), np.zeros(S, np.int32)
        tokens_S[:end], supervised_S[:end], is_image_S[:end] = row.ids, row.supervised, row.is_image
        valid_S[:end], segment_S[:end] = True, row.turn
        return Rendered(
            tokens_S, is_image_S, supervised_S, valid_S, segment_S, row.dropped, row.instruction, row.truncated
        )

    def ask(self, question: str, *, num_queries: int, num_images: int = 1) -> Composed:
        """The prompt of a single question, up to and including the assistant mark; nothing is supervised."""
        tokens = self._tokens(pieces(self.template, [Turn(question, "")], num_images, asking=True))
        row = self._spread(tokens, num_queries, num_images, 0, self.instruction(question), 0)
        return row._replace(supervised=[False] * len(row.ids))

    def render_question(self, question: str, *, num_queries: int) -> list[int]:
        """The ids of `ask` for one image."""
        return self.ask(question, num_queries=num_queries).ids

    def prompt_text(self, question: str) -> str:
        """What `ask` tokenises, the begin mark and one image token included; for tools that take text."""
        return self.template.begin + "".join(
            p.text for p in pieces(self.template, [Turn(question, "")], 1, asking=True)
        )

    def instruction(self, question: str) -> tuple[int, ...]:
        """The question's ids alone: what may condition a compressor."""
        return self.encode(question.replace(MARK, "").strip() if MARK in question else question)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """What a right model generates: the answer and its end mark."""
        tokens = self._tokens(pieces(self.template, [Turn("", answer)], 0))
        return tuple(token.id for token in tokens if token.said)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the first end mark, special tokens left out."""
        ids = [int(i) for i in ids]
        width = len(self._end)
        ends = (i for i in range(len(ids)) if ids[i] in self.stop_ids or tuple(ids[i : i + width]) == self._end)
        return self.tokenizer.decode(ids[: next(ends, len(ids))], skip_special_tokens=True).strip()

    def unknown_words(self, text: str) -> list[str]:
        """The pieces of `text` that this tokenizer has no id for."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[first:past] for token, (first, past) in found if token == self._unknown_id]

    def check_vocab(self, vocab: int) -> None:
        """ValueError if the tokenizer has ids that an LLM of `vocab` rows has no embedding for."""
        beyond = sorted((i, text) for text, i in self.tokenizer.get_vocab(with_added_tokens=True).items() if i >= vocab)
        if beyond:
            named = [f"{text!r} = {i}" for i, text in beyond[:6]]
            raise ValueError(
                f"the tokenizer has {len(beyond)} tokens beyond the LLM's vocab={vocab}: {', '.join(named)}. Use the "
                f"tokenizer of this LLM's own checkpoint."
            )

    def _tokens(self, found: Sequence[Piece]) -> list[_Token]:
        """Every pass's tokens, in order; one token per image."""
        tokens = [_Token(i, 0, supervised=i in self._everywhere) for i in self._begin]
        for group in passes(self.template, found):
            tokens += self._of_pass(group)
        return tokens

    def _of_pass(self, group: list[Piece]) -> list[_Token]:
        """A token is of the last piece it has characters of, and learned if any of its pieces is."""
        roles = [(piece.turn, piece.image, piece.said, piece.supervised) for piece in group]
        if len(group) == 1:
            ids = (self.image_id,) if group[0].image else self.encode(group[0].text)
            return [self._token(i, *roles[0]) for i in ids]
        text = "".join(piece.text for piece in group)
        encoding = self._plain.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        self._refuse_unknown(text, ids)
        owner = [place for place, piece in enumerate(group) for _ in piece.text]
        tokens = []
        for i, (start, past) in zip(ids, offsets, strict=True):
            first, last = owner[min(start, len(owner) - 1)], owner[max(past - 1, 0)]
            turn, image, said, supervised = roles[last]
            for _, _, also_said, also_supervised in roles[first:last]:
                said, supervised = said or also_said, supervised or also_supervised
            tokens.append(self._token(i, turn, image, said, supervised))
        return tokens

    def _token(self, i: int, turn: int, image: bool, said: bool, supervised: bool) -> _Token:
        if image:
            return _Token(self.image_id, turn, True, False, False)
        return _Token(i, turn, False, said, supervised or i in self._everywhere)

    def _spread(
        self, tokens: list[_Token], num_queries: int, num_images: int, dropped: int, instruction: tuple, truncated: int
    ) -> Composed:
        """Every image's token num_queries times."""
        spread: list[_Token] = []
        for token in tokens:
            if token.image:
                spread += [token] * num_queries
            else:
                spread.append(token)
        ids, turns, is_image, _, supervised = map(list, zip(*spread, strict=True)) if spread else ([] for _ in range(5))
        return Composed(ids, is_image, supervised, turns, num_images, dropped, instruction, truncated)

    def _behind_answer(self, text: str) -> tuple[int, ...]:
        """The ids of a string that follows an answer."""
        if self.template.passes == "span":
            return self.encode(text)
        answer = f"{self.template.lead}a"
        encoding = self._plain.encode(answer + text, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return tuple(i for i, (first, _) in pairs if first >= len(answer))

    def _learned_everywhere(self, text: str) -> tuple[int, ...]:
        found = self.encode(text)
        if len(found) != 1:
            raise ValueError(
                f"Template.everywhere names {text!r}, which is {len(found)} tokens of the tokenizer, not one."
            )
        return found

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._plain.encode(text, add_special_tokens=False).ids)
        self._refuse_unknown(text, ids)
        return ids

    def _refuse_unknown(self, text: str, ids: Sequence[int]) -> None:
        if self._unknown_id is not None and self._unknown_id in ids:
            raise ValueError(
                f"the tokenizer has no id for {self.unknown_words(text)} in {text!r}; "
                f"use the tokenizer the dataset was made for, or add the words."
            )

    def _single(self, field: str) -> int:
        text = getattr(self.template, field)
        found = self.tokenizer.token_to_id(text)
        if found is None:
            added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
            words = ("image", "vision", "reserved", "unused", "spare", "pad", "extra")
            near = [token for token in added if any(word in token.lower() for word in words)][:6]
            raise ValueError(
                f"Template.{field}={text!r} is not one token of the tokenizer; add it to the tokenizer or name a "
                f"reserved token it has: {near or added[:6]}."
                + (
                    ' Template.image="" needs none: image positions then carry the id of pad.'
                    if field == "image"
                    else ""
                )
            )
        return found

    def _pad_of(self, marks: Marks) -> int:
        if marks.pad_id is None:
            raise ValueError(
                'Template.pad="" takes the tokenizer\'s own pad, but its files name none; name a token, for instance "<unk>".'
            )
        return marks.pad_id


def _without_post_processor(tokenizer: Tokenizer) -> Tokenizer:
    """Post-processors move offsets (byte-level ones trim blanks) that the mask is read from."""
    if tokenizer.post_processor is None:
        return tokenizer
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return plain


def _text(tokens: list[_Token], turns: int | None = None) -> int:
    """Positions that are no image, of the first `turns` turns or of all."""
    return sum([not token.image and (turns is None or token.turn <= turns) for token in tokens])
