"""An RGB image of any shape -> the uint8 pixels a tower reads, exactly as the published processors place and resize it.

    canvas:  the image, or the square it is padded to                         pad, letterbox
    resize:  to size_YX, to a shorter side, or to whole patches within a budget
    window:  the part of it that is kept                                      crop, pad, letterbox

Only the window is computed: an image of 1 x 50000 with its shorter side at 336 would be 5.6 billion pixels, of which a crop
keeps 336 x 336. Sources: transformers 5.23 (CLIPImageProcessor, SiglipImageProcessor, Siglip2ImageProcessor,
BitImageProcessor, LlavaImageProcessor) and TRI-ML/prismatic-vlms (LetterboxPad); tests/test_geometry.py holds us to them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from tcjax.config import Pixels

_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


class Plan(NamedTuple):
    """canvas_YX: the image lies at `at_YX` in it. resized_YX: what all of it becomes. window: first row and column kept,
    and how many."""

    canvas_YX: tuple[int, int]
    at_YX: tuple[int, int]
    resized_YX: tuple[int, int]
    window: tuple[int, int, int, int]


def plan(height: int, width: int, pixels: Pixels) -> Plan:
    """Where every pixel of an image of this size goes. 480 x 640 by CLIP's crop of 336: 336 x 448, columns 56 ... 391."""
    Y, X = pixels.size_YX
    whole = (height, width)
    if pixels.geometry == "squash":
        return Plan(whole, (0, 0), (Y, X), (0, 0, Y, X))
    if pixels.geometry == "naflex":
        rows, columns = patch_grid(height, width, pixels.patch, pixels.max_patches)
        resized = (rows * pixels.patch, columns * pixels.patch)
        return Plan(whole, (0, 0), resized, (0, 0, *resized))
    side, canvas, at = max(whole), whole, (0, 0)
    if pixels.geometry == "pad":
        canvas, at = (side, side), ((side - height) // 2, (side - width) // 2)
    elif pixels.geometry == "letterbox":
        at = ((side - height) // 2, (side - width) // 2)
        canvas = (height + 2 * at[0], width + 2 * at[1])
    shortest, long, short = pixels.shortest or min(Y, X), max(canvas), min(canvas)
    rows, columns = (
        (shortest, int(shortest * long / short)) if canvas[0] <= canvas[1] else (int(shortest * long / short), shortest)
    )
    # Prismatic crops with torchvision, which rounds half a pixel to even; transformers rounds down.
    halved = round if pixels.geometry == "letterbox" else int
    return Plan(canvas, at, (rows, columns), (halved((rows - Y) / 2), halved((columns - X) / 2), Y, X))


def patch_grid(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches: the largest scale, found by bisection as published, at which `most` patches do."""

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
        return rows, columns

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = at(middle)
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return at(low)


def fit(image: Image.Image, pixels: Pixels) -> np.ndarray:
    """uint8 image_YX3 of an RGB image; for naflex the resized image, whole patches in both directions."""
    way = plan(image.height, image.width, pixels)
    if way.canvas_YX != (image.height, image.width):
        (rows, columns), (top, left) = way.canvas_YX, way.at_YX
        canvas = Image.new("RGB", (columns, rows), tuple(int(255 * mean) for mean in pixels.mean))
        canvas.paste(image, (left, top))
        image = canvas
    (height, width), (top, left, Y, X) = way.resized_YX, way.window
    resample = _RESAMPLE[pixels.resample]
    # Pillow 13 resizes a tall image to fewer rows first, which rounds differently: such an image is resized whole.
    tall = image.height > 1.9 * image.width and height * width <= _WHOLE
    if (height, width) == (Y, X) or tall:
        whole_YX3 = np.asarray(image.resize((width, height), resample))
        return whole_YX3[top : top + Y, left : left + X].copy()
    return np.array(_window(image, way, resample))


_WHOLE = 2**24
_SUPPORT = 3  # of the widest filter, lanczos, in pixels of the smaller of the two images


def _window(image: Image.Image, way: Plan, resample: Image.Resampling) -> Image.Image:
    """The window alone, columns before rows as all of the image would be."""
    (height, width), (top, left, Y, X) = way.resized_YX, way.window
    per_row, per_column = image.height / height, image.width / width
    first, last = top * per_row, min((top + Y) * per_row, image.height)
    reach = _SUPPORT * max(per_row, 1) + 1
    start, stop = max(math.floor(first - reach), 0), min(math.ceil(last + reach), image.height)
    rows = image if stop - start == image.height else image.crop((0, start, image.width, stop))
    box = (left * per_column, 0, min((left + X) * per_column, image.width), rows.height)
    columns = rows.resize((X, rows.height), resample, box)
    return columns.resize((X, Y), resample, (0, first - start, X, last - start))


def patch_rows(image_YX3: np.ndarray, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """naflex: patches as rows [max_patches, patch * patch, 3], row-major over the grid, zeros behind; int32 (rows, columns)."""
    side = pixels.patch
    H, W = image_YX3.shape[0] // side, image_YX3.shape[1] // side
    rows = np.zeros(pixels.shape, image_YX3.dtype)
    rows[: H * W] = image_YX3.reshape(H, side, W, side, 3).swapaxes(1, 2).reshape(H * W, side * side, 3)
    return rows, np.array([H, W], np.int32)


def assembled(rows: np.ndarray, grid_2: np.ndarray, pixels: Pixels) -> np.ndarray:
    """The image_YX3 that `patch_rows` took apart."""
    (H, W), side = grid_2, pixels.patch
    tiles = rows[: H * W].reshape(H, W, side, side, 3)
    return tiles.swapaxes(1, 2).reshape(H * side, W * side, 3)
