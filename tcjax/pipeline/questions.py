"""The evaluation set: from every board the first question of each task, as prompts padded on the left to one length.

    <pad> ...  <bos> <image> x Q <user> question <assistant>          the next token generated is the answer's first

Left padding puts every prompt's end at the same place, so a whole batch generates in step. Order is the split's own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tcjax.pipeline.chat import Chat, fitted
from tcjax.pipeline.sample import Records


class EvaluationSet(NamedTuple):
    """One row per question, B of them.

    index_B: int32 record of the split, for `Prepared.image` or a feature cache.
    task_B, question_B, answer_B: str. chance_B: float32, accuracy of the best guess without the image.
    tokens_BS, is_image_BS, valid_BS: the prompt, padded on the left. instruction_BT: the question's ids alone, -1 after
    their end, for a compressor that is told the question; all -1 is the null text.
    answer_BT: int32 ids of the answer and its end mark, -1 after it.
    """

    index_B: np.ndarray
    task_B: np.ndarray
    question_B: np.ndarray
    answer_B: np.ndarray
    chance_B: np.ndarray
    tokens_BS: np.ndarray
    is_image_BS: np.ndarray
    valid_BS: np.ndarray
    instruction_BT: np.ndarray
    answer_BT: np.ndarray

    def rows(self, rows: np.ndarray | slice) -> EvaluationSet:
        """Some of the questions."""
        return EvaluationSet(*(column[rows] for column in self))

    def without_text(self) -> EvaluationSet:
        """The compressor is told nothing; the LLM still reads the question."""
        return self._replace(instruction_BT=np.full_like(self.instruction_BT, -1))

    def with_other_text(self) -> EvaluationSet:
        """The compressor is told another question: never this one, unless all are the same."""
        texts, which_B = np.unique(self.instruction_BT, axis=0, return_inverse=True)
        other_B = (which_B.reshape(-1) + max(len(texts) // 2, 1)) % len(texts)
        return self._replace(instruction_BT=texts[other_B])


def questions(
    prepared: Records, chat: Chat, *, num_queries: int, boards: int = 0, tasks: tuple[str, ...] = ()
) -> EvaluationSet:
    """Every board's first question of each task.

    Args:
        num_queries: Q, image positions in every prompt.
        boards: only the first so many records; 0 takes all.
        tasks: only these; () takes all the dataset has.
    """
    count = min(boards, len(prepared)) if boards else len(prepared)
    asked = []
    for index in range(count):
        record = prepared[index]
        missing = {"task", "chance"} - set(record.fields)
        if missing:
            raise ValueError(
                f"{prepared.folder} cannot be scored: its turns lack {sorted(missing)}; see docs of its builder."
            )
        first: dict[str, tuple] = {}
        labels = zip(record.fields["task"], record.fields["chance"], record.turns, strict=True)
        for task, chance, (question, answer) in labels:
            first.setdefault(task.decode(), (question, answer, chance))
        asked += [(index, task, *rest) for task, rest in first.items() if not tasks or task in tasks]
    if not asked:
        raise ValueError(f"no question of tasks {tasks} in {count} records of {prepared.folder} ({prepared.split}).")

    index, task, question, answer, chance = (np.array(column) for column in zip(*asked, strict=True))
    prompts = [chat.ask(text, num_queries=num_queries) for text in question.tolist()]
    instructions = [chat.instruction(text) for text in question.tolist()]
    longest = max(map(len, instructions))
    return EvaluationSet(
        index_B=index.astype(np.int32),
        task_B=task,
        question_B=question,
        answer_B=answer,
        chance_B=chance.astype(np.float32),
        tokens_BS=_pad([prompt.ids for prompt in prompts], chat.pad_id, left=True),
        is_image_BS=_pad([prompt.is_image for prompt in prompts], 0, left=True).astype(bool),
        valid_BS=_pad([[1] * len(prompt.ids) for prompt in prompts], 0, left=True).astype(bool),
        instruction_BT=np.stack([fitted(ids, longest) for ids in instructions]),
        answer_BT=_pad([chat.answer_ids(text) for text in answer.tolist()], -1, left=False),
    )


def _pad(rows: list, fill: int, *, left: bool) -> np.ndarray:
    length = max(map(len, rows))
    padded = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        padded[i, length - len(row) if left else 0 : None if left else len(row)] = row
    return padded
