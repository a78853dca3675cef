"""Images of published files and of the command line, and what the controls show instead of them.

locate    a folder and where an image may lie in it -> its file; a path may not leave the folder
grey      the mean colour, once normalised: "blank"
noise     independent pixels with the mean and deviation of the dataset's own: "random"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tcjax.config import Pixels

SAMPLED = 64  # images whose colours stand for the dataset's


def locate(folder: Path, places: Sequence[str]) -> Path | None:
    """The first of `places` that is a file below the folder, or None; ValueError if one of them leads out of it."""
    base = folder.resolve()
    for place in places:
        path = (base / place).resolve()
        if not path.is_relative_to(base):
            raise ValueError(f"the image path {place!r} leads out of {folder}; paths in published files stay below it.")
        if path.is_file():
            return path
    return None


def grey(pixels: Pixels) -> np.ndarray:
    """float32 image_YX3 that carries nothing."""
    return np.zeros((*pixels.size_YX, 3), np.float32)


class Noise:
    """Random images: every pixel and channel drawn alone, as bright and as spread as the given normalised images are."""

    def __init__(self, images: Iterable[np.ndarray]):
        colours = [image_YX3.reshape(-1, 3) for image_YX3, _ in zip(images, range(SAMPLED), strict=False)]
        if not colours:
            raise ValueError("random images need at least one readable image to take mean and deviation from.")
        self._mean = np.mean([image.mean(0) for image in colours], axis=0)
        self._std = np.sqrt(np.mean([((image - self._mean) ** 2).mean(0) for image in colours], axis=0))

    def of(self, number: int, pixels: Pixels) -> np.ndarray:
        """float32 image_YX3, the same for the same number."""
        drawn_YX3 = np.random.default_rng([number, 0x6E6F]).standard_normal((*pixels.size_YX, 3))
        return (self._mean + self._std * drawn_YX3).astype(np.float32)
