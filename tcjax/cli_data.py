"""The verb about data: prepare, verify and preview of any source, seen as a run would read it.

tcjax data prepare data/digit_boards                      runs the folder's own builder
tcjax data prepare mix665k.json --images coco --out DIR   stores any source as array_record
tcjax data verify SOURCE --config configs/boards.py       everything that is wrong, exit code 1 if anything is
tcjax data preview --config configs/boards.py             a page of conversations and pictures
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from tcjax.arguments import pair, parse
from tcjax.config import Pixels, Source, Template

Positional = tyro.conf.Positional

ACTIONS = ("prepare", "verify", "preview")

_EVERY = 10.0  # seconds between lines where no bar can be shown


@dataclass(frozen=True, kw_only=True)
class Data:
    """prepare: write a dataset's shards. verify: read everything and say what is wrong. preview: a page to look at.

    source: a dataset folder, .json, .jsonl, .yaml, .tar, .parquet, a folder of those, or "shard-{000..012}.tar". verify and
        preview take all of a config's sources if none is named.
    config: CONFIG of a run: its tokenizer, template, pixels, tokens and text_length, so that what is shown is what it reads.
        tokenizer, size ("336x336"), text_length say otherwise, or all there is to say without a config.
    format, images, split, sampling, seed, min_rating: as in tcjax.config.Source.
    threads: that read and decode.
    allow: kinds of problems, separated by commas, that verify reports without failing.
    json: verify prints a JSON list, one report per source.
    rows: how many conversations preview draws. out: where preview or prepare write; without it prepare runs the builder of
        a dataset folder.
    leave_out: prepare leaves out rows that are no samples, and names them, instead of stopping. shard: records per file.
    """

    action: Positional[str]
    source: Positional[str] = ""
    config: str = ""
    format: str = ""
    images: str = ""
    split: str = ""
    sampling: str = ""
    seed: int = 0
    min_rating: int = 0
    tokenizer: Path | None = None
    size: str = ""
    text_length: int = 0
    threads: int = 4
    allow: str = ""
    json: bool = False
    rows: int = 8
    out: Path | None = None
    leave_out: bool = False
    shard: int = 4096


def data(arguments: list[str]) -> int:
    asked = parse(Data, arguments)
    if asked.action not in ACTIONS:
        raise ValueError(f"data {asked.action!r} is unknown; choose one of {', '.join(ACTIONS)}.")
    if not asked.source and (asked.action == "prepare" or not asked.config):
        raise ValueError(f"tcjax data {asked.action} SOURCE: name a dataset folder or file.")
    return {"prepare": _prepare, "verify": _verify, "preview": _preview}[asked.action](asked)


def _prepare(asked: Data) -> int:
    from tcjax import content
    from tcjax.pipeline.prepare import prepare

    if asked.out is None:
        folder = Path(asked.source)
        sys.path.insert(0, str(content.project_root(folder)))  # a builder may use its neighbour's
        print(prepare(folder))
        return 0

    from tcjax.identity import dataset
    from tcjax.pipeline.source import open_source
    from tcjax.pipeline.store import store

    seen = _seen(asked)
    (source,) = seen.sources
    facts = dataclasses.asdict(source) | {"content": dataset(seen.root, source.path)}
    with _progress(f"prepare {source.path}") as progress:
        records = open_source(seen.root, source)
        out = store(
            records,
            asked.out,
            source=facts,
            shard=asked.shard,
            leave_out=asked.leave_out,
            threads=asked.threads,
            progress=progress,
        )
    facts = json.loads((out / "records.json").read_text())
    print(f"{out}: {facts['records']} records in {len(facts['shards'])} files, {len(facts['left_out'])} rows left out")
    return 0


def _verify(asked: Data) -> int:
    from tcjax.pipeline.source import open_source
    from tcjax.pipeline.verify import verify

    seen, allowed, failed, reports = _seen(asked), set(asked.allow.split(",")), False, []
    for source in seen.sources:
        with _progress(f"verify {source.path}") as progress:
            records = open_source(seen.root, source)
            found = verify(
                records, seen.chat, seen.pixels, text_length=seen.text_length, threads=asked.threads, progress=progress
            )
        problems = {kind: number for kind, number in found.problems.items() if kind not in allowed}
        failed |= bool(problems)
        reports.append({"source": dataclasses.asdict(source)} | found.to_dict())
        if asked.json:
            continue
        print(
            f"{source.path} {records.split}: {found.records} records, {found.images} images ({found.repeated_images} came "
            f"before), {found.text_only} without; longest conversation {found.longest} positions ({found.longest_id})"
        )
        for kind, examples in found.findings.items():
            print(f"  {kind}: {len(examples)}{'' if kind in problems else ', allowed'}")
            for example in examples[:5]:
                print(f"    {example}")
        print("no problems" if not problems else f"{sum(problems.values())} problems")
    if asked.json:
        print(json.dumps(reports, indent=1, ensure_ascii=False))
    return 1 if failed else 0


def _preview(asked: Data) -> int:
    from tcjax.pipeline.preview import preview
    from tcjax.pipeline.source import open_source

    if asked.rows < 1:
        raise ValueError(f"--rows {asked.rows}: takes a whole number from 1 up.")
    seen, out = _seen(asked), asked.out or Path("runs/preview.html")
    for number, source in enumerate(seen.sources):
        records = open_source(seen.root, source)
        page = out if number == 0 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        print(
            preview(
                records,
                seen.chat,
                seen.pixels,
                page,
                num_queries=seen.num_queries,
                text_length=seen.text_length,
                rows=range(min(asked.rows, len(records))),
            )
        )
    return 0


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """How the data is looked at: by a run's eyes, or by the flags'."""

    root: Path
    sources: tuple[Source, ...]
    tokenizer: Path
    template: Template
    pixels: Pixels
    num_queries: int
    text_length: int

    @property
    def chat(self) -> Any:
        from tcjax.pipeline.chat import open_chat

        return open_chat(self.tokenizer, self.template)


def _seen(asked: Data) -> _Seen:
    from tcjax import content

    size = pair(asked.size, "--size") if asked.size else None
    if not asked.config:
        path = Path(asked.source)
        root = content.project_root(path if path.exists() else path.parent)
        return _Seen(
            root=root,
            sources=(_source(asked, root, ()),),
            tokenizer=asked.tokenizer or Path("configs/boards_base/tokenizer.json"),
            template=Template(),
            pixels=Pixels(size_YX=size or (64, 64)),
            num_queries=0,
            text_length=asked.text_length or 144,
        )
    run, root = content.call(asked.config)
    known = run.data.sources
    pixels = run.model.tower.pixels
    return _Seen(
        root=root,
        sources=(_source(asked, root, known),)
        if asked.source
        else tuple(_changed(source, asked, root) for source in known),
        tokenizer=asked.tokenizer or root / run.data.tokenizer,
        template=run.data.template,
        pixels=dataclasses.replace(pixels, size_YX=size) if size else pixels,
        num_queries=run.model.num_queries,
        text_length=asked.text_length or run.data.text_length,
    )


def _source(asked: Data, root: Path, known: tuple[Source, ...]) -> Source:
    """The source that the command names; the config's own words about it hold where no flag says otherwise."""
    path = _below(root, asked.source)
    found = next((source for source in known if source.path in (path, asked.source)), Source(path=path))
    return _changed(found, asked, root)


def _changed(source: Source, asked: Data, root: Path) -> Source:
    said = {name: getattr(asked, name) for name in ("format", "split", "sampling", "seed", "min_rating")}
    said["images"] = _below(root, asked.images) if asked.images else ""
    return dataclasses.replace(source, **{name: value for name, value in said.items() if value})


def _below(root: Path, path: str) -> str:
    """A path as a config in the project would write it."""
    whole = Path(path).resolve()
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(whole)


@contextmanager
def _progress(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and remaining time on a terminal; elsewhere a line now and then. Both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, start = Console(stderr=True), time.monotonic()
    spoken = start

    def rate(done: int) -> float:
        return done / max(time.monotonic() - start, 1e-9)

    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(words, total=None, rate="")
            yield lambda done, total: bar.update(task, completed=done, total=total, rate=f"{rate(done):.0f}/s")
        return

    def say(done: int, total: int) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= _EVERY:
            spoken = time.monotonic()
            left = (total - done) / max(rate(done), 1e-9)
            print(f"{words}: {done} of {total}, {rate(done):.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

    yield say
