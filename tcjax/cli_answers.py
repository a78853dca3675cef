"""The verbs that ask a trained run: evaluate, compare and generate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from tcjax import processes
from tcjax.arguments import numbers, parse

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Answer the run's questions, or a published benchmark's, and print the scores.

    run: folder of a trained run. json: print the scores as JSON instead of a table.
    queries: comma-separated numbers of visual tokens at which to score the same weights (elastic compressors; `tcjax
        compressors` says which); left out, the number it was trained at.
    benchmark: vqav2, gqa, textvqa, docvqa, pope, mme, coco, scienceqa or cub, from its published files in the folder
        `files`; the images lie below `images` (default: `files`). split, mode: default to the benchmark's first; a wrong
        one lists them. limit: only the first so many questions. max_tokens: of an answer (default: the mode's).
        controls: comma-separated, of blank, shuffled, random. batch: questions answered together.
        Questions that this checkpoint has answered already are not asked again.
    coordinator, processes, process: as of `tcjax train`, for the run's own questions; a benchmark is answered by one process.
    """

    run: Positional[Path]
    queries: str = ""
    benchmark: str = ""
    files: Path | None = None
    images: Path | None = None
    split: str = ""
    mode: str = ""
    limit: int = 0
    max_tokens: int = 0
    controls: str = ""
    batch: int = 16
    json: bool = False
    quiet: bool = False
    coordinator: str = ""
    processes: int = 0
    process: int = -1


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Two runs on the benchmarks both answered: each headline, and their difference paired question by question."""

    a: Positional[Path]
    b: Positional[Path]
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Ask a trained run: tcjax generate RUN image.jpg "question"; the answer appears token by token.

    run: folder of a trained run. asked: image files, as many as the run takes, and the question behind them. Without a
    question, and at a terminal, questions are read line by line until an empty one.
    max_tokens: the most an answer may have.
    """

    run: Positional[Path]
    asked: Positional[tuple[str, ...]] = ()
    max_tokens: int = 128
    json: bool = False


def evaluate(arguments: list[str]) -> int:
    asked = parse(Evaluate, arguments)
    if asked.benchmark:
        return _benchmark(asked)
    given = [
        name for name in ("files", "images", "split", "mode", "limit", "max_tokens", "controls") if getattr(asked, name)
    ]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags}: only with --benchmark NAME; the run's own evaluation is set in its config.")

    from tcjax import content
    from tcjax.answer import evaluate_run
    from tcjax.job import at, load_run, trained
    from tcjax.study.tables import score_table

    run, root = load_run(asked.run), content.project_root(asked.run)
    processes.join(asked.coordinator, asked.processes, asked.process, quiet=asked.quiet)
    model, identity, step = trained(run, root=root, out=asked.run)
    queries = numbers(asked.queries, "--queries")
    places = {number: asked.run / f"at-{number}" for number in queries} if queries else {None: asked.run}
    every = []
    for number, place in places.items():
        here, its_model = (run, model) if number is None else at(run, model, number)
        scores = evaluate_run(here, its_model, identity, root=root, out=place, quiet=asked.quiet)  # pyright: ignore
        every.append(scores | {"step": step})
        if not asked.json and processes.is_first():
            score_table(run.name, step, scores)
    if asked.json and processes.is_first():
        print(json.dumps(every if queries else every[0], indent=1))
    return 0


def _benchmark(asked: Evaluate) -> int:
    if asked.files is None:
        raise ValueError(
            "--files DIR names the folder of the benchmark's published files; docs/benchmarks.md says which."
        )
    if asked.batch < 1:
        raise ValueError(f"--batch {asked.batch}: takes a whole number from 1 up.")

    from tcjax.evaluate.suite import check_mode, suite

    suite(asked.benchmark)
    check_mode(asked.benchmark, asked.mode)

    from tcjax import content
    from tcjax.answer_suite import Benchmark, evaluate_suite
    from tcjax.job import at, load_run, trained
    from tcjax.reply import Responder
    from tcjax.study.tables import benchmark_table

    run, root = load_run(asked.run), content.project_root(asked.run)
    wanted = Benchmark(
        name=asked.benchmark,
        files=asked.files,
        images=asked.images,
        split=asked.split,
        mode=asked.mode,
        limit=asked.limit,
        max_tokens=asked.max_tokens,
        controls=tuple(name.strip() for name in asked.controls.split(",") if name.strip()),
    )
    model, _, step = trained(run, root=root, out=asked.run)
    queries = numbers(asked.queries, "--queries")
    every = []
    for number in queries or (None,):
        here, its_model = (run, model) if number is None else at(run, model, number)
        out = asked.run if number is None else asked.run / f"at-{number}"
        responder = Responder(here, its_model, root=root, batch=asked.batch, step=step)  # pyright: ignore
        scores = evaluate_suite(responder, wanted, out=out, quiet=asked.quiet)
        every.append(scores | ({} if number is None else {"visual_tokens": number}))
        if not asked.json:
            benchmark_table(here.name, scores)
    if asked.json:
        print(json.dumps(every if queries else every[0], indent=1))
    return 0


def compare(arguments: list[str]) -> int:
    asked = parse(Compare, arguments)

    from tcjax.answer_suite import compare_runs
    from tcjax.study.tables import comparison_table

    found = compare_runs(asked.a, asked.b)
    if asked.json:
        lines = [{"benchmark": line.title, "headline": line.headline} for line in found]
        for line, one in zip(lines, found, strict=True):
            line |= {"a": one.a._asdict(), "b": one.b._asdict(), "gain": one.gain._asdict()}
        print(json.dumps(lines, indent=1))
    else:
        comparison_table(str(asked.a), str(asked.b), found)
    return 0


def generate(arguments: list[str]) -> int:
    asked = parse(Generate, arguments)
    if asked.max_tokens < 1:
        raise ValueError(f"--max-tokens {asked.max_tokens}: takes a whole number from 1 up.")
    files, question = _images_and_question(asked.asked)
    if question is None and not sys.stdin.isatty():
        raise ValueError('no question: tcjax generate RUN image.jpg "What is in the picture?"')

    from tcjax import content
    from tcjax.reply import Asked, Responder

    responder = Responder.of_folder(asked.run, root=content.project_root(asked.run), batch=1)
    images = tuple(responder.picture(file.read_bytes(), str(file)) for file in files)
    for text in [question] if question is not None else _typed():
        pieces = []
        for piece in responder.stream(Asked(text, images), asked.max_tokens):
            pieces.append(piece)
            if not asked.json:
                print(piece, end="", flush=True)
        print(json.dumps({"question": text, "answer": "".join(pieces)}) if asked.json else "")
    return 0


def _images_and_question(words: tuple[str, ...]) -> tuple[list[Path], str | None]:
    """All words but the last are image files; the last is one too, or the question."""
    question = None
    if words and not Path(words[-1]).is_file():
        words, question = words[:-1], words[-1]
        if " " not in question and Path(question).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"):
            raise ValueError(f"no such image file: {question}")
    for word in words:
        if not Path(word).is_file():
            raise ValueError(f"no such image file: {word}")
    return [Path(word) for word in words], question


def _typed() -> Iterator[str]:
    """Lines of a terminal until an empty one."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
