"""Encoded bytes -> image_YX3 uint8 -> normalised float32, exactly the pixels PIL decodes.

    (value / 255 - mean) / std          per channel, as the published towers' processors do

An image of another size than the tower's is resized bicubically. What cannot be decoded to RGB raises `CorruptImage`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from tcjax.config import Pixels
from tcjax.pipeline.encoded import rgb
from tcjax.pipeline.sample import CorruptImage, Record

__all__ = ["CorruptImage", "decode", "normalise", "of"]


def decode(encoded: bytes, pixels: Pixels, image_id: str) -> np.ndarray:
    """uint8 image_YX3 of the tower's size.

    What becomes of grey, palette, CMYK and 16-bit images says tcjax/pipeline/encoded.py.
    """
    Y, X = pixels.size_YX
    image = rgb(encoded, image_id)
    if image.size != (X, Y):
        image = image.resize((X, Y), Image.Resampling.BICUBIC)
    return np.array(image)


def of(record: Record, pixels: Pixels) -> np.ndarray:
    """float32 normalised image_YX3 of a record's first image; CorruptImage if it cannot be read."""
    return normalise(decode(record.images[0], pixels, record.image_id), pixels)


def normalise(images_BYX3: np.ndarray, pixels: Pixels) -> np.ndarray:
    """float32 pixels as the tower wants them; any leading axes."""
    scale = 1 / (255 * np.asarray(pixels.std, np.float64))
    shift = np.asarray(pixels.mean, np.float64) / np.asarray(pixels.std, np.float64)
    return images_BYX3.astype(np.float32) * scale.astype(np.float32) - shift.astype(np.float32)
