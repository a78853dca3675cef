"""Encoded bytes -> the uint8 pixels a tower reads, exactly those PIL decodes and the published processors resize.

    (value / 255 - mean) / std          per channel: the tower, on the device (tcjax/nn/pixels.py), or `normalise` here

Bytes travel to the device: a quarter of what normalised pixels would weigh. tcjax/pipeline/encoded.py says what is decoded,
tcjax/pipeline/geometry.py where every pixel goes. What cannot be decoded to RGB raises `CorruptImage`.
"""

from __future__ import annotations

import numpy as np

from tcjax.config import Pixels
from tcjax.pipeline import geometry
from tcjax.pipeline.encoded import MAX_PIXELS, rgb
from tcjax.pipeline.sample import CorruptImage, Record

__all__ = ["CorruptImage", "decode", "normalise", "of", "read", "shown"]


def decode(encoded: bytes, pixels: Pixels, image_id: str) -> np.ndarray:
    """uint8 pixels of shape `pixels.shape`."""
    return read(encoded, pixels, image_id)[0]


def read(encoded: bytes, pixels: Pixels, image_id: str) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 pixels of shape `pixels.shape`, and naflex's int32 grid (rows, columns); None for the other geometries."""
    image_YX3 = shown(encoded, pixels, image_id)
    return geometry.patch_rows(image_YX3, pixels) if pixels.geometry == "naflex" else (image_YX3, None)


def shown(encoded: bytes, pixels: Pixels, image_id: str) -> np.ndarray:
    """uint8 image_YX3 as the tower sees it; naflex's before it is cut into patches."""
    image = rgb(encoded, image_id)
    Y, X = geometry.plan(image.height, image.width, pixels).canvas_YX
    if Y * X > MAX_PIXELS:
        raise CorruptImage(
            image_id, f"the square it is padded to has {Y} x {X} pixels, and at most {MAX_PIXELS} are made"
        )
    return geometry.fit(image, pixels)


def of(record: Record, pixels: Pixels, number: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """`read` of one of a record's images; CorruptImage if it cannot be read."""
    return read(record.images[number], pixels, record.image_id)


def normalise(images: np.ndarray, pixels: Pixels) -> np.ndarray:
    """float32 pixels as the tower wants them, on the host; any leading axes, channels last."""
    scale = 1 / (255 * np.asarray(pixels.std, np.float64))
    shift = np.asarray(pixels.mean, np.float64) / np.asarray(pixels.std, np.float64)
    return images.astype(np.float32) * scale.astype(np.float32) - shift.astype(np.float32)
