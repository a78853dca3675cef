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

# uint8 pixels, or float32 ones that are normalised already, of shape `Pixels.shape`; and naflex's grid of patches.
Seen = tuple[np.ndarray, np.ndarray | None]

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


def grey(pixels: Pixels) -> Seen:
    """An image that carries nothing."""
    side = pixels.size_YX[0] // pixels.patch if pixels.geometry == "naflex" else 0
    return np.zeros(pixels.shape, np.float32), np.full(2, side, np.int32) if side else None


def stacked(name: str, seen: Sequence[Seen]) -> dict[str, np.ndarray]:
    """Batch fields of images, or of their features, and of their grids."""
    grids = [grid for _, grid in seen if grid is not None]
    return {name: np.stack([array for array, _ in seen])} | ({"grids_B2": np.stack(grids)} if grids else {})


class Noise:
    """Random images: every pixel and channel drawn alone, as bright and as spread as the given normalised images are."""

    def __init__(self, images: Iterable[np.ndarray]):
        colours = [image.reshape(-1, 3) for image, _ in zip(images, range(SAMPLED), strict=False)]
        if not colours:
            raise ValueError("random images need at least one readable image to take mean and deviation from.")
        self._mean = np.mean([image.mean(0) for image in colours], axis=0)
        self._std = np.sqrt(np.mean([((image - self._mean) ** 2).mean(0) for image in colours], axis=0))

    def of(self, number: int, pixels: Pixels) -> Seen:
        """The same image for the same number."""
        blank, grid = grey(pixels)
        drawn = np.random.default_rng([number, 0x6E6F]).standard_normal((*blank.shape[:-1], blank.shape[-1] // 3, 3))
        return (self._mean + self._std * drawn).astype(np.float32).reshape(blank.shape), grid
