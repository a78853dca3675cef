"""Encoded bytes -> image_YX3 uint8 -> normalised float32, exactly the pixels PIL decodes.

    (value / 255 - mean) / std          per channel, as the published towers' processors do

An image of another size than the tower's is resized bicubically. What cannot be decoded to RGB raises `CorruptImage`.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tcjax.config import Pixels
from tcjax.pipeline.sample import Record


class CorruptImage(ValueError):
    """An image that cannot be read; `image_id` names it."""

    def __init__(self, image_id: str, reason: str):
        super().__init__(f"image {image_id!r} cannot be read ({reason}); replace it and prepare the dataset again.")
        self.image_id = image_id


def decode(encoded: bytes, pixels: Pixels, image_id: str) -> np.ndarray:
    """uint8 image_YX3 of the tower's size.

    Grey and palette images become RGB; transparency is dropped.
    """
    Y, X = pixels.size_YX
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            if rgb.size != (X, Y):
                rgb = rgb.resize((X, Y), Image.Resampling.BICUBIC)
            return np.array(rgb)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptImage(image_id, f"{type(error).__name__}: {error}") from error


def of(record: Record, pixels: Pixels) -> np.ndarray:
    """float32 normalised image_YX3 of a record's first image; CorruptImage if it cannot be read."""
    return normalise(decode(record.images[0], pixels, record.image_id), pixels)


def normalise(images_BYX3: np.ndarray, pixels: Pixels) -> np.ndarray:
    """float32 pixels as the tower wants them; any leading axes."""
    scale = 1 / (255 * np.asarray(pixels.std, np.float64))
    shift = np.asarray(pixels.mean, np.float64) / np.asarray(pixels.std, np.float64)
    return images_BYX3.astype(np.float32) * scale.astype(np.float32) - shift.astype(np.float32)
