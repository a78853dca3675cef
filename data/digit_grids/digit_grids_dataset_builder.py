"""Full grids: a digit in all 64 cells, its scan lightly distorted. They train a tower, nobody asks about them.

    tcjax data prepare data/digit_grids          6,000 grids, 384,000 digits

A digit board is mostly empty, and a tower learns digits from digits: a grid shows eight times as many for the same work.
Only the training scans of digit_boards occur. Half of them are rotated (8 degrees), scaled (10 %) and sheared (0.1) at
random, one standard deviation each, so that 1,197 scans do not become 1,197 memories.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data.digit_boards import boards
from data.digit_boards.digit_boards_dataset_builder import scans_of

SPLIT = 3  # behind train, validation and test of digit_boards: no generator occurs twice


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
    train: int = 6_000
    seed: int = 0


class Builder(tfds.core.GeneratorBasedBuilder):
    """One example per grid, with the fields of digit_boards and a single question."""

    name = "digit_grids"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [Config(name="published", description="6,000 grids, seed 0")]

    def _info(self) -> tfds.core.DatasetInfo:
        cells = tfds.features.Tensor(shape=(boards.CELLS, boards.CELLS), dtype=np.int8)
        turn = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            license="digits: CC BY 4.0 (UCI, Alpaydin and Kaynak 1998)",
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(boards.SIZE, boards.SIZE, 3), encoding_format="png"),
                    "image_id": tfds.features.Text(),
                    "turns": tfds.features.Sequence(turn),
                    "digit_cells": cells,
                    "colour_cells": cells,
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        config: Config = self.builder_config
        scans = scans_of("train", config.seed)
        for index in range(config.train):
            yield index, example(config.seed, index, scans)


def example(seed: int, index: int, scans: list[np.ndarray]) -> dict:
    rng = boards.generator(seed, SPLIT, index)
    shape = (boards.CELLS, boards.CELLS)
    digits = rng.integers(0, 10, shape).astype(np.int8)
    colours = rng.integers(0, len(boards.COLOURS), shape).astype(np.int8)
    board = boards.Board(digits, colours, (0, 0))
    own = [distorted(rng, scans[digit][rng.integers(0, len(scans[digit]), 16)]) for digit in range(10)]
    png = io.BytesIO()
    Image.fromarray(boards.draw(rng, board, own)).save(png, "PNG")
    return {
        "image": png.getvalue(),
        "image_id": f"grid-{index:05d}",
        "turns": [{"question": f"at 1 1 : {digits[0, 0]} or {9 - digits[0, 0]} ?", "answer": str(digits[0, 0])}],
        "digit_cells": digits,
        "colour_cells": colours,
    }


def distorted(rng: np.random.Generator, scans_NYX: np.ndarray) -> np.ndarray:
    """Every second scan under a random affine map about its centre, read bilinearly; float32 [N, 8, 8]."""
    from scipy.ndimage import affine_transform

    out = scans_NYX.copy()
    centre = (np.array(out.shape[1:]) - 1) / 2
    for i in range(0, len(out), 2):
        angle, shear, scale = rng.normal(0, np.deg2rad(8)), rng.normal(0, 0.1), np.exp(rng.normal(0, 0.1, 2))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        back = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(scale)
        out[i] = affine_transform(out[i], back, centre - back @ centre, order=1)
    return out
