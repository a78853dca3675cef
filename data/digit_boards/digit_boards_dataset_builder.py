"""Digit boards as a TFDS dataset: encoded PNG + one conversation per board, in order of index, without TensorFlow.

    tcjax data prepare data/digit_boards          23,000 boards

The digits are scikit-learn's `load_digits`: 1,797 scans of 8 x 8 pixels (UCI, CC BY 4.0). A scan belongs to one split
only, so test boards show handwriting that training never saw.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from . import boards

SPLITS = ("train", "validation", "test")
SCANS = {"train": 1197, "validation": 200, "test": 400}


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
    """Boards per split; tests make a few, the published dataset is the default."""

    train: int = 20_000
    validation: int = 1_000
    test: int = 2_000
    seed: int = 0


class Builder(tfds.core.GeneratorBasedBuilder):
    """One example per board; see boards.py for what a board is."""

    name = "digit_boards"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [Config(name="published", description="20,000 / 1,000 / 2,000 boards, seed 0")]

    def _info(self) -> tfds.core.DatasetInfo:
        cells = tfds.features.Tensor(shape=(boards.CELLS, boards.CELLS), dtype=np.int8)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://archive.ics.uci.edu/dataset/80",
            license="digits: CC BY 4.0 (UCI, Alpaydin and Kaynak 1998)",
            disable_shuffling=True,  # record i is board i
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(boards.SIZE, boards.SIZE, 3), encoding_format="png"),
                    "image_id": tfds.features.Text(),
                    "turns": tfds.features.Sequence(
                        {
                            "task": tfds.features.Text(),
                            "question": tfds.features.Text(),
                            "answer": tfds.features.Text(),
                            "chance": tfds.features.Scalar(np.float32),
                        }
                    ),
                    "digit_cells": cells,
                    "colour_cells": cells,
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        config: Config = self.builder_config
        scans = scans_of(split, config.seed)
        for index in range(getattr(config, split)):
            yield index, example(config.seed, split, index, scans)


def example(seed: int, split: str, index: int, scans: list[np.ndarray]) -> dict:
    """Board `index` of a split, as the features above."""
    rng = boards.generator(seed, SPLITS.index(split), index)
    board, turns = boards.plan(rng)
    png = io.BytesIO()
    image = Image.fromarray(boards.draw(rng, board, scans))
    image.save(png, "PNG", compress_level=1)  # a third of the default level's time, a fourth larger
    return {
        "image": png.getvalue(),
        "image_id": f"{split}-{index:05d}",
        "turns": [{**turn._asdict(), "chance": boards.CHANCE[turn.task]} for turn in turns],
        "digit_cells": board.digit_cells,
        "colour_cells": board.colour_cells,
    }


def scan_indices(split: str, seed: int, labels: np.ndarray) -> np.ndarray:
    """Which scans a split draws from: disjoint, and every digit in the proportion it has among all scans."""
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(np.arange(len(labels)), test_size=SCANS["test"], stratify=labels, random_state=seed)
    train, validation = train_test_split(
        rest, train_size=SCANS["train"], test_size=SCANS["validation"], stratify=labels[rest], random_state=seed
    )
    return {"train": train, "validation": validation, "test": test}[split]


def scans_of(split: str, seed: int) -> list[np.ndarray]:
    """Per digit 0..9 its scans, float32 [number of scans, 8, 8] of ink between 0 and 1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    indices = scan_indices(split, seed, digits.target)
    ink, labels = (digits.images[indices] / 16).astype(np.float32), digits.target[indices]
    return [ink[labels == digit] for digit in range(10)]
