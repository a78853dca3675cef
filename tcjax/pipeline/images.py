"""Encoded bytes -> the uint8 pixels a tower reads, exactly those PIL decodes and the published processors resize.

    (value / 255 - mean) / std          per channel: `normalise` here, or the tower on the device (tcjax/nn/pixels.py)

Bytes travel to the device: a quarter of what normalised pixels would weigh. Transparency is laid on white, as transformers
does since 5.0 (LLaVA's own code drops it); the camera's orientation mark is not applied, as in both. What cannot be
decoded to RGB raises `CorruptImage`, and so does, before it is decoded, an image of more than `MOST` pixels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tcjax.config import Pixels
from tcjax.pipeline import geometry
from tcjax.pipeline.sample import Record

# PIL's own limit for a warning, 9459 x 9459: 268 MB of RGB. 20000 x 20000 would be 1.2 GB from a file of any size.
MOST = 89_478_485


class CorruptImage(ValueError):
    """An image that cannot be read; `image_id` names it."""

    def __init__(self, image_id: str, reason: str):
        super().__init__(f"image {image_id!r} cannot be read ({reason}); replace it and prepare the dataset again.")
        self.image_id = image_id


def decode(encoded: bytes, pixels: Pixels, image_id: str) -> np.ndarray:
    """uint8 pixels of shape `pixels.shape`."""
    return read(encoded, pixels, image_id)[0]


def read(encoded: bytes, pixels: Pixels, image_id: str) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 pixels of shape `pixels.shape`, and naflex's int32 grid (rows, columns); None for the other geometries."""
    image_YX3 = shown(encoded, pixels, image_id)
    return geometry.patch_rows(image_YX3, pixels) if pixels.geometry == "naflex" else (image_YX3, None)


def shown(encoded: bytes, pixels: Pixels, image_id: str) -> np.ndarray:
    """uint8 image_YX3 as the tower sees it; naflex's before it is cut into patches."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _refuse(image.height, image.width, "it")
            _refuse(*geometry.plan(image.height, image.width, pixels).canvas_YX, "the square it is padded to")
            return geometry.fit(_rgb(image), pixels)
    except _UNREADABLE as error:
        raise CorruptImage(image_id, f"{type(error).__name__}: {error}") from error


_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def _refuse(height: int, width: int, what: str) -> None:
    if height * width > MOST:
        raise ValueError(f"{what} has {height} x {width} pixels, and {MOST} are the most")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def of(record: Record, pixels: Pixels, number: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """`read` of one of a record's images; CorruptImage if it cannot be read."""
    return read(record.images[number], pixels, record.image_id)


def normalise(images: np.ndarray, pixels: Pixels) -> np.ndarray:
    """float32 pixels as the tower wants them, on the host; any leading axes, channels last."""
    scale = 1 / (255 * np.asarray(pixels.std, np.float64))
    shift = np.asarray(pixels.mean, np.float64) / np.asarray(pixels.std, np.float64)
    return images.astype(np.float32) * scale.astype(np.float32) - shift.astype(np.float32)
