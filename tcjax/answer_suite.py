"""A published benchmark through a trained run: its questions asked once, its scores, its submission, the controls.

A run's folder gains benchmarks/<suite>-<split>-<mode>/ (and -<control> behind it):

    predictions.jsonl    what was asked and said so far, the run's facts on its first line; asking goes on from there
    answers.jsonl        one line per question: id, image, question, prediction, truths, score, and what it adds to the sums
    scores.json          headline with its interval, every metric
    submission/          the files in the benchmark's own result format

The controls ask the same questions about a grey image ("blank"), another question's image ("shuffled") and noise of the
dataset's colours ("random"): what they score is owed to language alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from tcjax.config import Run
from tcjax.evaluate import suite as suites
from tcjax.evaluate.statistics import Estimate
from tcjax.evaluate.suites.question import Judged, Question
from tcjax.pipeline.images import normalise
from tcjax.pipeline.pictures import Noise, Seen, grey, locate
from tcjax.record import to_dict, write_json
from tcjax.reply import Asked, Responder

CONTROLS = ("blank", "shuffled", "random")
BENCHMARKS = "benchmarks"
_THREADS = 4


class Benchmark(NamedTuple):
    """files: folder of the published files. images: folder below which the images lie; None is `files`.

    split, mode: "" is the suite's first. limit: only the first so many questions; 0 is all.
    max_tokens: of an answer; 0 is what the mode's published scores allow.
    """

    name: str
    files: Path
    images: Path | None = None
    split: str = ""
    mode: str = ""
    limit: int = 0
    max_tokens: int = 0
    controls: tuple[str, ...] = ()


def evaluate_suite(responder: Responder, asked: Benchmark, *, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Ask, judge, write.

    Returns:
        benchmark, split, mode, step, questions, folder; where the split's answers are published also headline
        {name, mean, low, high, n}, metrics {name: value} and controls {control: headline}.

    Raises:
        ValueError: an unknown benchmark, split, mode or control; a published file or an image that is missing or foreign.
        CorruptImage: an image that cannot be read.
    """
    which, mode = suites.suite(asked.name), suites.check_mode(asked.name, asked.mode)
    unknown = sorted(set(asked.controls) - set(CONTROLS))
    if unknown:
        raise ValueError(f"controls {unknown} are unknown; choose among {', '.join(CONTROLS)}.")
    if asked.limit < 0 or asked.max_tokens < 0:
        raise ValueError(
            f"limit={asked.limit} and max_tokens={asked.max_tokens} take whole numbers from 1 up; 0 is unset."
        )
    if not asked.files.is_dir():
        raise ValueError(f"{asked.files} is not a folder; --files names the one with {which.FILES}.")
    split = asked.split or next(iter(which.SPLITS))
    questions = which.read(asked.files, split, mode)
    questions = questions[: asked.limit] if asked.limit else questions
    if not questions:
        raise ValueError(f"{asked.files} holds no question of {asked.name} {split}.")
    looks = Looks(responder, questions, asked.images or asked.files)

    folder = out / BENCHMARKS / f"{asked.name}-{split}-{mode}"
    tokens = asked.max_tokens or which.max_tokens(mode)
    found: dict[str, Any] = {"benchmark": asked.name, "split": split, "mode": mode, "step": responder.step}
    found |= {"questions": len(questions), "folder": str(folder)}
    controls = {}
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet, transient=True, console=Console(stderr=True)) as bar:
        for control in ("", *asked.controls):
            place = folder.with_name(f"{folder.name}-{control}") if control else folder
            facts = {key: found[key] for key in ("benchmark", "split", "mode", "step")}
            facts |= {"control": control, "max_tokens": tokens, "run": _run_hash(responder.run)}
            task = bar.add_task(f"{asked.name} {control}".strip(), total=len(questions))
            advance = partial(_advance, bar, task)
            predictions = _ask(responder, questions, looks.of(control), tokens, place, facts, advance)
            _submit(place, which.submission(questions, predictions, mode))
            if any(not question.truths for question in questions):
                continue
            report = suites.score(asked.name, questions, predictions, mode)
            _write_answers(place / "answers.jsonl", questions, predictions, report.each)
            headline = {"name": which.HEADLINE} | report.headline._asdict()
            write_json(place / "scores.json", facts | {"headline": headline, "metrics": report.metrics})
            if control:
                controls[control] = headline
            else:
                found |= {"headline": headline, "metrics": report.metrics}
    return found | {"controls": controls}


class Looks:
    """What the images of questions look like, as they are and in each control."""

    def __init__(self, responder: Responder, questions: Sequence[Question], folder: Path):
        self._responder, self._folder = responder, folder
        places = {question.images[0]: question.images for question in questions if question.images}
        found = {image: locate(folder, possible) for image, possible in places.items()}
        missing = [" or ".join(places[image]) for image, path in found.items() if path is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(found)} images are not below {folder}, for instance {missing[0]}; --images names "
                f"the folder they lie in."
            )
        self._paths: dict[str, Path] = {image: path for image, path in found.items() if path is not None}
        self._number = {image: number for number, image in enumerate(self._paths)}
        self._noise: Noise | None = None

    def of(self, control: str) -> Callable[[Question], tuple[Seen, ...]]:
        """The images a question is asked with."""
        shown = {"": self._own, "blank": self._blank, "shuffled": self._other, "random": self._random}[control]
        responder = self._responder
        if control == "random" and self._noise is None and self._paths:
            self._noise = Noise(normalise(self._read(image)[0], responder.pixels) for image in self._paths)
        return lambda question: (shown(question.images[0]),) if question.images else ()

    def _read(self, image: str) -> Seen:
        return self._responder.picture(self._paths[image].read_bytes(), str(self._paths[image]))

    def _own(self, image: str) -> Seen:
        return self._read(image)

    def _blank(self, image: str) -> Seen:
        return grey(self._responder.pixels)

    def _other(self, image: str) -> Seen:
        """The image half the set away: never the question's own, unless it is the only one."""
        images = list(self._paths)
        return self._read(images[(self._number[image] + max(len(images) // 2, 1)) % len(images)])

    def _random(self, image: str) -> Seen:
        assert self._noise is not None
        return self._noise.of(self._number[image], self._responder.pixels)


def _ask(
    responder: Responder,
    questions: Sequence[Question],
    look: Callable[[Question], tuple[Seen, ...]],
    tokens: int,
    folder: Path,
    facts: dict[str, Any],
    show: Callable[[int], None],
) -> list[str]:
    """Predictions in the order of the questions; those that the folder holds already are not asked again."""
    said = _earlier(folder / "predictions.jsonl", facts)
    done = {q.id: said[q.id]["prediction"] for q in questions if said.get(q.id, {}).get("prompt") == q.prompt}
    show(len(done))
    left = [question for question in questions if question.id not in done]
    shapes = [responder.shape(question.prompt, len(question.images)) for question in left]
    order = sorted(range(len(left)), key=lambda place: shapes[place])
    folder.mkdir(parents=True, exist_ok=True)
    if not said:
        (folder / "predictions.jsonl").write_text(json.dumps(facts) + "\n")
    with (folder / "predictions.jsonl").open("a") as file, ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(order), responder.size):
            some = [left[place] for place in order[start : start + responder.size]]
            rows = [Asked(q.prompt, seen) for q, seen in zip(some, threads.map(look, some), strict=True)]
            choices = some[0].choices
            answers = responder.likeliest(rows, choices) if choices else responder.answers(rows, tokens)
            for question, answer in zip(some, answers, strict=True):
                done[question.id] = answer
                line = {"id": question.id, "prompt": question.prompt, "prediction": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            show(len(some))
    return [done[question.id] for question in questions]


def _earlier(path: Path, facts: dict[str, Any]) -> dict[str, dict]:
    """{id: line} of an interrupted asking; {} if there is none, or if another checkpoint or setting was asked."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the last line of an asking that was killed
            continue
    if not lines or lines[0] != facts:
        return {}
    if not path.read_text(encoding="utf-8").endswith("\n"):
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {line["id"]: line for line in lines[1:]}


def _write_answers(
    path: Path, questions: Sequence[Question], predictions: Sequence[str], each: Sequence[Judged]
) -> None:
    with path.open("w") as file:
        for question, said, judged in zip(questions, predictions, each, strict=True):
            line = {"id": question.id, "image": question.cluster, "question": question.fields.get("question", "")}
            line |= {"prediction": said, "truths": list(question.truths)}
            line |= {"score": judged.score, "parts": judged.parts}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _submit(folder: Path, files: dict[str, bytes]) -> None:
    (folder / "submission").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / "submission" / name).write_bytes(content)


def _run_hash(run: Run) -> str:
    return hashlib.sha256(json.dumps(to_dict(run)).encode()).hexdigest()[:16]


def _advance(bar: Progress, task: TaskID, done: int) -> None:
    bar.update(task, advance=done)


# Two runs ------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One benchmark that two runs answered. gain: a minus b, paired; its interval holds 0 where they may be equal."""

    title: str
    headline: str
    a: Estimate
    b: Estimate
    gain: Estimate


def compare_runs(a: Path, b: Path) -> list[Comparison]:
    """Every benchmark (in its split, mode and control) that both runs' folders hold.

    Raises:
        ValueError: they have none in common, or answered different questions.
    """
    folders = [{path.parent.name: path.parent for path in (run / BENCHMARKS).glob("*/answers.jsonl")} for run in (a, b)]
    both = [name for name in sorted(folders[0]) if name in folders[1]]
    if not both:
        raise ValueError(
            f"{a} and {b} have no benchmark in common: {sorted(folders[0])} and {sorted(folders[1])}. "
            f"`tcjax evaluate RUN --benchmark ...` answers one."
        )
    found = []
    for name in both:
        facts, lines = zip(*(_judged(folder[name]) for folder in folders), strict=True)
        ids = [[line["id"] for line in some] for some in lines]
        if ids[0] != ids[1]:
            raise ValueError(
                f"{name}: {a} answered {len(ids[0])} questions and {b} {len(ids[1])} others; use one limit."
            )
        suite, mode = facts[0]["benchmark"], facts[0]["mode"]
        of_a, of_b = ([Judged(line["score"], line["parts"]) for line in some] for some in lines)
        clusters = [line["image"] for line in lines[0]]
        found.append(Comparison(name, suites.suite(suite).HEADLINE, *suites.compare(suite, of_a, of_b, clusters, mode)))
    return found


def _judged(folder: Path) -> tuple[dict, list[dict]]:
    lines = [json.loads(text) for text in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads((folder / "scores.json").read_text()), lines
