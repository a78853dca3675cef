"""A dataset that lives in memory, of any shape a test wants: so many images, so long an answer; and who read what."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data.digit_boards import vocabulary
from tcjax.config import DataConfig, Pixels, Source
from tcjax.pipeline import input
from tcjax.pipeline.sample import BadSample, Record, Turn

PIXELS = Pixels(size_YX=(16, 16))


class Memory:
    """Record i has images[i] pictures and one turn per number in answers[i], an answer of so many digits.

    broken: {record: "image" (its first does not decode) or "record" (its file is no conversation)}.
    reads: how often each record was read.
    """

    label_names = ()

    def __init__(self, name: str, images, answers, broken=None):
        self.name, self.folder, self.split = name, Path(name), "train"
        self.images, self.answers, self.broken = images, answers, broken or {}
        self.reads = Counter()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        self.reads[index] += 1
        name = f"{self.name}-{index}"
        if self.broken.get(index) == "record":
            raise BadSample(name, "an answer without a question")
        pictures = [picture(self.name, index, number) for number in range(self.images[index])]
        if self.broken.get(index) == "image":
            pictures[0] = pictures[0][:20]
        random = np.random.default_rng([3, index])
        turns = [
            Turn("read word ?" if turn else "colour of 7 ?", " ".join(map(str, random.integers(0, 10, num))))
            for turn, num in enumerate(self.answers[index])
        ]
        return Record(tuple(pictures), name, turns, {})


def picture(name: str, index: int, number: int) -> bytes:
    """A PNG of its own for every image."""
    random = np.random.default_rng([len(name), index, number])
    png = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(png, "PNG")
    return png.getvalue()


def mixed(name: str = "mixed", num: int = 60, most: int = 1, seed: int = 0) -> Memory:
    """Records of 0 to `most` images and answers of 1 to 12 digits in one or two turns."""
    random = np.random.default_rng(seed)
    images = random.integers(0, most + 1, num).tolist()
    answers = [random.integers(1, 13, random.integers(1, 3)).tolist() for _ in range(num)]
    return Memory(name, images, answers)


def opened(monkeypatch, root: Path, *sources: Memory, **changes) -> DataConfig:
    """A config whose sources are these; `root` gets the tokenizer."""
    by_name = {source.name: source for source in sources}
    monkeypatch.setattr(input, "open_source", lambda root, source: by_name[source.path])
    vocabulary.tokenizer().save(str(root / "tokenizer.json"))
    weights = changes.pop("weights", (1.0,) * len(sources))
    named = tuple(Source(path=s.name, format="memory", weight=w) for s, w in zip(sources, weights, strict=True))
    defaults = {"sources": named, "tokenizer": "tokenizer.json", "batch": 4, "threads": 0, "text_length": 44}
    return DataConfig(**(defaults | changes))
