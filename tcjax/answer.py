"""Evaluating a Run: its questions through the trained model, the controls, the scores, and what an answer costs.

Every question of the evaluation source is asked alone: the image, the question, a greedy answer. The controls ask the
same questions about a grey image ("blank"), another sample's image ("shuffled") and noise of the data's own colours
("random"): what they score is owed to language alone. A compressor that is told the question is also told nothing
("null_text") or another question ("shuffled_text"), while the LLM reads the right one: what the score loses is owed to
the conditioning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from tcjax.batch import Batch
from tcjax.compressors.base import Context
from tcjax.config import Run, Source
from tcjax.evaluate.cost import cost
from tcjax.evaluate.generate import make_generate, make_prefill
from tcjax.evaluate.scores import Answer, exact_match, is_right, mean_accuracy, token_accuracy
from tcjax.job import tower_features
from tcjax.pipeline import images as pictures
from tcjax.pipeline.chat import Chat, fitted, open_chat
from tcjax.pipeline.images import CorruptImage
from tcjax.pipeline.input import TooManyCorrupt
from tcjax.pipeline.pictures import Noise, grey, stacked
from tcjax.pipeline.questions import EvaluationSet, questions
from tcjax.pipeline.source import open_source
from tcjax.processes import is_first
from tcjax.sharding import replicated
from tcjax.vlm import Vlm, VlmConfig

CONTROLS = ("blank", "shuffled", "random")
TEXT_CONTROLS = ("null_text", "shuffled_text")
SHORT = 8  # answers of up to so many tokens are generated together, longer ones apart
TIMED = 5  # prefills measured; the median is reported


def evaluate_run(
    run: Run, model: Vlm, identity: dict[str, Any], *, root: Path, out: Path, quiet: bool = False
) -> dict[str, Any]:
    """Scores and cost of a trained run; writes every answer to `out`/answers.jsonl.

    Returns:
        accuracy {task: {mean, low, high, n}}, token_accuracy and chance {task: share}, controls {control: accuracy},
        mean_accuracy, visual_tokens, ratio, prefill_flops, kv_bytes, prefill_seconds (per image, median),
        corrupt_images: names of those that could not be read; their questions are not asked.

    Of several processes all call it, and each gets the scores; the first one writes.

    Raises:
        TooManyCorrupt: more than `run.data.max_corrupt` of the images cannot be read.
    """
    quiet = quiet or not is_first()
    if run.evaluate is None:
        raise ValueError(f"{run.name} has no `evaluate`: its config says nothing to score it on.")
    config, scored = run.model, run.evaluate
    if not isinstance(config, VlmConfig):
        raise ValueError(f"{run.name} trains a {type(config).__name__}, which answers no questions; evaluate a VLM.")
    possible = CONTROLS + (TEXT_CONTROLS if config.reads_text else ())
    unknown = sorted(set(scored.controls) - set(possible))
    if unknown:
        raise ValueError(
            f"controls {unknown} are unknown; choose among {list(possible)} (those of the text need a compressor that "
            f"is told the question)."
        )
    chat = open_chat(root / run.data.tokenizer, run.data.template)
    asked = questions(open_source(root, scored.source), chat, num_queries=config.num_queries, boards=scored.boards)
    end = chat.stop_ids
    images = Images(model, identity, run, root=root, quiet=quiet)
    images.check(run.data.max_corrupt)
    asked = asked.rows(np.isin(asked.index_B, images.readable))
    answer = make_generate(model, end=end)

    passes = {
        "": (asked, images.of),
        "blank": (asked, images.blank),
        "shuffled": (asked, images.shuffled),
        "random": (asked, images.random),
        "null_text": (asked.without_text(), images.of),
        "shuffled_text": (asked.with_other_text(), images.of),
    }
    passes = {name: passes[name] for name in ("", *scored.controls)}
    answers: dict[str, list[Answer]] = {}
    with Progress(disable=quiet, transient=True, console=Console(stderr=True)) as bar:
        every = np.arange(len(asked.index_B))
        once = {name: distinct(asked) if name == "blank" else (every, every) for name in passes}
        task = bar.add_task(f"{run.name}: answers", total=sum(len(rows) for rows, _ in once.values()))
        for name, (told, look) in passes.items():
            rows, place_B = once[name]
            heard = _ask(answer, told.rows(rows), look, scored.batch, lambda done: bar.update(task, advance=done))
            said = [heard[place] for place in place_B]
            expected = [[i for i in ids if i >= 0] for ids in asked.answer_BT.tolist()]
            answers[name] = [Answer(*pair) for pair in zip(asked.task_B.tolist(), expected, said, strict=True)]
    if is_first():
        _write(out / "answers.jsonl", asked, answers[""], chat, end)
    accuracy = exact_match(answers[""], end)
    text_tokens = asked.tokens_BS.shape[1] - config.num_queries
    bill = cost(config, text_tokens)
    return {
        "visual_tokens": bill.visual_tokens,
        "ratio": bill.ratio,
        "accuracy": accuracy,
        "token_accuracy": token_accuracy(answers[""], end),
        "chance": {task: float(asked.chance_B[asked.task_B == task].mean()) for task in accuracy},
        "controls": {control: exact_match(answers[control], end) for control in scored.controls},
        "mean_accuracy": mean_accuracy(accuracy).mean,
        "prefill_flops": bill.prefill_flops,
        "kv_bytes": bill.kv_bytes,
        "prefill_seconds": _prefill_seconds(model, asked, images, scored.batch),
        "corrupt_images": images.corrupt,
    }


class Images:
    """Where the evaluated images come from: the feature cache or the files; and what the controls show instead.

    readable: int [n], positions in the source. corrupt: image_ids of the others.
    """

    def __init__(
        self,
        model: Vlm,
        identity: dict,
        run: Run,
        *,
        root: Path,
        quiet: bool,
    ):
        scored = run.evaluate
        assert scored is not None
        split = scored.source.split
        if scored.boards and "[" not in split:
            split = f"{split}[:{scored.boards}]"
        source: Source = dataclasses.replace(scored.source, split=split)
        self._prepared, self._pixels = open_source(root, source), model.tower.cfg.pixels
        cached = bool(run.train.feature_cache)
        self._features = tower_features(model, identity, run, source, root=root, quiet=quiet) if cached else None
        self._noise: Noise | None = None
        self._grey = stacked("images_BYX3", [grey(self._pixels)])
        if cached:
            graphdef, state = nnx.split(model)
            see = jax.jit(
                lambda state, told: nnx.merge(graphdef, state).see(Batch(**told)), out_shardings=replicated(state)
            )
            self._grey["features_BNC"] = np.asarray(see(state, self._grey))
            del self._grey["images_BYX3"]

        found = [self._can_read(index) for index in range(len(self._prepared))]
        self.readable = np.flatnonzero(found)
        self.corrupt = [self._prepared[index].image_id for index in np.flatnonzero(np.invert(found)).tolist()]

    def _can_read(self, index: int) -> bool:
        if self._features is not None:
            return self._features.readable(index)
        try:
            pictures.of(self._prepared[index], self._pixels)
        except CorruptImage:
            return False
        return True

    def check(self, allowed: float) -> None:
        """TooManyCorrupt if a larger share than `allowed` cannot be read."""
        bad, num = len(self.corrupt), len(self._prepared)
        if bad > allowed * num:
            raise TooManyCorrupt(
                f"{bad} of {num} images of {self._prepared.folder} ({self._prepared.split}) are unreadable, more than "
                f"max_corrupt={allowed} allows: {self.corrupt[:8]}. Repair the images and prepare the dataset again, or "
                f"raise max_corrupt."
            )

    def pixels(self, index_B: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 images_BYX3, and grids_B2 where every image has its own."""
        return stacked("images_BYX3", [pictures.of(self._prepared[int(index)], self._pixels) for index in index_B])

    def of(self, index_B: np.ndarray) -> dict[str, np.ndarray]:
        """The images of the questions, or their cached features."""
        features = self._features
        if features is None:
            return self.pixels(index_B)
        seen = [(features(index).astype(np.float32), features.grid(index)) for index in index_B.tolist()]
        return stacked("features_BNC", seen)

    def blank(self, index_B: np.ndarray) -> dict[str, np.ndarray]:
        """The same grey image for every question."""
        return {name: np.broadcast_to(one, (len(index_B), *one.shape[1:])) for name, one in self._grey.items()}

    def shuffled(self, index_B: np.ndarray) -> dict[str, np.ndarray]:
        """The image half the set away: never the question's own, unless it is the only one."""
        num = len(self.readable)
        position_B = np.searchsorted(self.readable, index_B)
        return self.of(self.readable[(position_B + max(num // 2, 1)) % num])

    def random(self, index_B: np.ndarray) -> dict[str, np.ndarray]:
        """Noise with the mean and deviation of the set's own colours, another for every image."""
        if self._noise is None:
            own = (pictures.of(self._prepared[int(index)], self._pixels)[0] for index in self.readable)
            self._noise = Noise(pictures.normalise(image, self._pixels) for image in own)
        return stacked("images_BYX3", [self._noise.of(int(index), self._pixels) for index in index_B])


def distinct(asked: EvaluationSet) -> tuple[np.ndarray, np.ndarray]:
    """Rows that ask every prompt once, and for every question its place among them.

    Where all see the same image, equal prompts get equal answers. The row with the longest right answer stands for its
    prompt, so that what is generated is long enough for all.
    """
    longest_first = np.argsort(-(asked.answer_BT >= 0).sum(1), kind="stable")
    _, first, back = np.unique(asked.tokens_BS[longest_first], axis=0, return_index=True, return_inverse=True)
    place_B = np.empty_like(back)
    place_B[longest_first] = back
    return longest_first[first], place_B


def looks(model: Vlm, run: Run, *, root: Path, out: Path, boards: int = 4) -> Path:
    """`out`/looks.npz: images uint8 [b, Y, X, 3], assign float32 [b, Q, H * W], grid (H, W), questions. For pictures.

    What a query gives the class token is no place in the picture and is left out.
    A compressor that is told the question is told each board's first one.
    """
    config, scored = run.model, run.evaluate
    assert isinstance(config, VlmConfig) and scored is not None
    prepared, shown, told = open_source(root, scored.source), [], []
    chat = open_chat(root / run.data.tokenizer, run.data.template)
    for index in range(len(prepared)):
        with contextlib.suppress(CorruptImage):
            question = prepared[index].turns[0].question if config.reads_text else ""
            name = f"{prepared[index].image_id}: {question}" if question else prepared[index].image_id
            shown.append((name, pictures.of(prepared[index], config.tower.pixels)))
            told.append(fitted(chat.instruction(question), run.data.instruction_length))
        if len(shown) == boards:
            break
    seen = stacked("images_BYX3", [image for _, image in shown])
    batch = Batch(**seen, instruction_BT=np.stack(told), index_B=np.arange(len(shown)))
    graphdef, state = nnx.split(model)

    def assigned(state: Any, batch: Batch) -> jax.Array:
        return nnx.merge(graphdef, state).compress(batch, Context(assign=True)).assign_BQN

    assign_BQN = np.asarray(jax.jit(assigned, out_shardings=replicated(state))(state, batch), np.float32)
    path = out / "looks.npz"
    if not is_first():
        return path
    np.savez_compressed(
        path,
        images=seen["images_BYX3"],
        assign=assign_BQN[..., config.widths.extra :],
        grid=np.array(config.widths.grid_HW),
        questions=np.array([name for name, _ in shown]),
    )
    return path


def _ask(
    answer: Callable[[Batch, int], jax.Array],
    asked: EvaluationSet,
    look: Callable[[np.ndarray], dict[str, np.ndarray]],
    size: int,
    show: Callable[[int], None],
) -> list[list[int]]:
    """Generated ids of every question, in order; the last batch is filled up with its first row to keep one shape."""
    length_B = (asked.answer_BT >= 0).sum(1)
    said: list[list[int]] = [[]] * len(length_B)
    for rows in (np.flatnonzero(length_B <= SHORT), np.flatnonzero(length_B > SHORT)):
        steps = int(length_B[rows].max(initial=0))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            filled = np.concatenate([some, np.repeat(some[:1], size - len(some))])
            ids = np.asarray(answer(_batch(asked.rows(filled), look), steps))[: len(some)]
            for row, generated in zip(some, ids.tolist(), strict=True):
                said[row] = generated
            show(len(some))
    return said


def _batch(asked: EvaluationSet, look: Callable[[np.ndarray], dict[str, np.ndarray]]) -> Batch:
    return Batch(
        tokens_BS=asked.tokens_BS,
        is_image_BS=asked.is_image_BS,
        valid_BS=asked.valid_BS,
        instruction_BT=asked.instruction_BT,
        index_B=asked.index_B,
        **look(asked.index_B),
    )


def _prefill_seconds(model: Vlm, asked: EvaluationSet, images: Images, size: int) -> float:
    """Seconds per image from pixels to the first token's logits, compiled and warm, batch `size`."""
    some = asked.rows(np.resize(np.arange(len(asked.index_B)), size))
    batch = _batch(some, images.pixels)
    prefill, seconds = make_prefill(model), []
    prefill(batch).block_until_ready()
    for _ in range(TIMED):
        begun = time.perf_counter()
        prefill(batch).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds)) / size


def _write(path: Path, asked: EvaluationSet, answers: list[Answer], chat: Chat, end: Sequence[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (asked.task_B, asked.question_B, asked.answer_B)
    with path.open("w") as file:
        rows = zip(asked.index_B.tolist(), *texts, answers, is_right(answers, end), strict=True)
        for index, task, question, answer, given, right in rows:
            line = {"index": index, "task": str(task), "question": str(question), "answer": str(answer)}
            line |= {"generated": chat.decode(given.generated), "right": bool(right)}
            file.write(json.dumps(line) + "\n")
