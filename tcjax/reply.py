"""A trained run that answers whoever asks: questions with encoded images in; texts, likelihoods or a stream out.

Prompts are padded on the left to whole `BUCKET`s, so that a few shapes are compiled and prompts of one length are
answered together. A text-only question holds a blank image that no position refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tcjax.batch import Batch
from tcjax.config import Run
from tcjax.evaluate.generate import make_generate
from tcjax.evaluate.likelihood import Likelihood, make_likelihood
from tcjax.evaluate.stream import make_stream
from tcjax.job import load_run, trained
from tcjax.pipeline import images as pictures
from tcjax.pipeline.chat import Chat, fitted, load_tokenizer
from tcjax.pipeline.pictures import Seen, grey, stacked
from tcjax.vlm import Vlm, VlmConfig

BUCKET = 32


class Asked(NamedTuple):
    """question: as the user would type it. images: as `Responder.picture` gives them, in order, or controls' instead."""

    question: str
    images: tuple[Seen, ...]


class Prompt(NamedTuple):
    ids: list[int]
    is_image: list[bool]
    instruction: tuple[int, ...]


class Responder:
    """batch: questions answered together. step: of the checkpoint that answers."""

    def __init__(self, run: Run, model: Vlm, *, root: Path, batch: int = 16, step: int = 0):
        if not isinstance(run.model, VlmConfig):
            raise ValueError(f"{run.name} trains a {type(run.model).__name__}, which answers no questions; ask a VLM.")
        self.run, self.config, self.size, self.step = run, run.model, batch, step
        self.chat = Chat(load_tokenizer(root / run.data.tokenizer))
        self.pixels = model.tower.cfg.pixels
        if len(self.chat.end_ids) != 1:
            raise ValueError(f"generation stops at one token, but Template.end is {len(self.chat.end_ids)} tokens.")
        (self.end,) = self.chat.end_ids
        self._generate, self._likelihood = make_generate(model, end=self.end), make_likelihood(model)
        self._stream = make_stream(model, end=self.end)

    @classmethod
    def of_folder(cls, out: Path, *, root: Path, batch: int = 16) -> Responder:
        """The run of a folder with its newest checkpoint; ValueError if it is none."""
        run = load_run(out)
        model, _, step = trained(run, root=root, out=out)
        return cls(run, model, root=root, batch=batch, step=step)  # pyright: ignore[reportArgumentType]

    def picture(self, encoded: bytes, name: str) -> Seen:
        """The pixels as the tower wants them; CorruptImage names what cannot be read."""
        return pictures.read(encoded, self.pixels, name)

    def prompt(self, question: str, num_images: int = 1) -> Prompt:
        """Ids up to the assistant mark; every image has Q positions."""
        ids = self.chat.render_question(question, num_queries=self.config.num_queries * num_images)
        is_image = [token == self.chat.image_id for token in ids]
        if sum(is_image) != self.config.num_queries * num_images:
            raise ValueError(
                f"{question[:80]!r} holds image marks of its own; images stand before a question, so leave the marks out."
            )
        return Prompt(ids, is_image, self.chat.instruction(question) if self.config.reads_text else ())

    def shape(self, question: str, num_images: int) -> tuple[int, int]:
        """Positions of the padded prompt and slots for images: questions that agree in both go into one batch."""
        num = len(self.prompt(question, num_images).ids)
        return -(-num // BUCKET) * BUCKET, max(num_images, 1)

    def answers(
        self, asked: Sequence[Asked], max_tokens: int, show: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The greedy answer to each, without its end mark."""
        said = [""] * len(asked)
        for rows, batch in self._batches(asked):
            ids_BT = np.asarray(self._generate(batch, max_tokens))
            for row, ids in zip(rows, ids_BT, strict=False):  # the rest fills the batch up
                said[row] = self.chat.decode(ids)
            show(len(rows))
        return said

    def likelihoods(
        self, asked: Sequence[Asked], choices: Sequence[str], show: Callable[[int], None] = lambda done: None
    ) -> Likelihood:
        """Of every choice after every question: its tokens' log-probabilities summed, [questions, choices]."""
        ids = [self.chat.encode(choice) for choice in choices]
        total, greedy = np.zeros((len(asked), len(ids)), np.float32), np.zeros((len(asked), len(ids)), bool)
        for rows, batch in self._batches(asked):
            found = self._likelihood(batch, ids)
            total[rows], greedy[rows] = found.total[: len(rows)], found.greedy[: len(rows)]
            show(len(rows))
        return Likelihood(total, greedy)

    def likeliest(
        self, asked: Sequence[Asked], choices: Sequence[str], show: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The choice with the largest mean log-probability per token."""
        lengths = np.array([len(self.chat.encode(choice)) for choice in choices])
        best = (self.likelihoods(asked, choices, show).total / lengths).argmax(1)
        return [choices[int(number)] for number in best]

    def stream(self, asked: Asked, max_tokens: int) -> Iterator[str]:
        """The answer in pieces as they come; joined, they are what `answers` says."""
        ids, said = [], ""
        for token in self._stream(self.batch([asked]), max_tokens):
            ids.append(token)
            text = self.chat.decode(ids)
            if not text.endswith("�") and len(text) > len(said):  # a letter of several tokens waits for the last
                yield text[len(said) :]
                said = text
        rest = self.chat.decode(ids)[len(said) :]
        if rest:
            yield rest

    def batch(self, asked: Sequence[Asked]) -> Batch:
        """Rows of one length and one number of images."""
        prompts = [self.prompt(one.question, len(one.images)) for one in asked]
        S, R = max(self.shape(one.question, len(one.images)) for one in asked)
        ids_BS, is_image_BS = np.full((len(asked), S), self.chat.pad_id, np.int32), np.zeros((len(asked), S), bool)
        valid_BS, shown, told = np.zeros((len(asked), S), bool), [], []
        for row, (one, prompt) in enumerate(zip(asked, prompts, strict=True)):
            start = S - len(prompt.ids)
            ids_BS[row, start:], is_image_BS[row, start:], valid_BS[row, start:] = prompt.ids, prompt.is_image, True
            shown += [*one.images, *[self._free_slot(asked)] * (R - len(one.images))]
            told += [fitted(prompt.instruction, self.run.data.instruction_length)] * R
        return Batch(
            tokens_BS=ids_BS,
            is_image_BS=is_image_BS,
            valid_BS=valid_BS,
            instruction_BT=np.stack(told) if self.config.reads_text else None,
            index_B=np.zeros(len(shown), np.int32),
            **stacked("images_BYX3", shown),
        )

    def _free_slot(self, asked: Sequence[Asked]) -> Seen:
        """A blank image of the same kind of numbers as those beside it."""
        blank, grid = grey(self.pixels)
        kinds = {image.dtype for one in asked for image, _ in one.images}
        return blank.astype(kinds.pop() if kinds else blank.dtype), grid

    def _batches(self, asked: Sequence[Asked]) -> Iterator[tuple[list[int], Batch]]:
        """Places in `asked` and their batch, filled up with its first question to keep one shape."""
        buckets: dict[tuple[int, int], list[int]] = {}
        for place, one in enumerate(asked):
            buckets.setdefault(self.shape(one.question, len(one.images)), []).append(place)
        for places in buckets.values():
            for start in range(0, len(places), self.size):
                rows = places[start : start + self.size]
                filled = rows + rows[:1] * (self.size - len(rows))
                yield rows, self.batch([asked[row] for row in filled])
