"""Encoded bytes as they lie on disk -> what they are, and their RGB image. Header first: nothing large is allocated in vain.

    probe(encoded)   b"..." -> ("JPEG", (height, width))     reads the header only
    rgb(encoded)     b"..." -> PIL image in RGB              decodes

Pixels are PIL's `convert("RGB")`, as LLaVA's loader has them: of an animation the first frame; CMYK by PIL's plain formula;
the EXIF orientation is ignored (LLaVA trains on such images lying on their side, and so do we, to stay comparable). Two
departures: transparency is laid on white, as transformers does since 5.0 where LLaVA drops it and shows what colour lies
beneath; 16-bit images keep their high byte, where PIL makes everything above 255 white.

An image may hold `MAX_PIXELS` pixels, about 9,459 x 9,459 or 256 MiB as RGB: where PIL starts to warn of a decompression
bomb. Formats that run other programs to be read (EPS) or are no single picture are not read at all.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tcjax.pipeline.sample import CorruptImage

MAX_PIXELS = 89_478_485

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # PIL opens MPO, two JPEGs in one file, as JPEG

# Suffixes a file of each format may carry; the first is the usual one.
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tiff", ".tif"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}


def probe(encoded: bytes, image_id: str) -> tuple[str, tuple[int, int]]:
    """The format the bytes have, whatever the file is called, and (height, width); CorruptImage if they have none."""
    try:
        with _opened(encoded, image_id) as image:
            return str(image.format), (image.height, image.width)
    except Exception as error:  # damaged bytes lead a decoder anywhere: struct.error, KeyError, zlib.error, ...
        raise _corrupt(image_id, error) from error


def rgb(encoded: bytes, image_id: str) -> Image.Image:
    """The image in RGB; CorruptImage names one that is cut short, damaged, too large or no image at all."""
    try:
        with _opened(encoded, image_id) as image:
            image.load()
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            if image.mode.startswith("I;16") or image.mode == "I":
                high_YX = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
                return Image.fromarray(high_YX).convert("RGB")
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # damaged bytes lead a decoder anywhere: struct.error, KeyError, zlib.error, ...
        raise _corrupt(image_id, error) from error


def _opened(encoded: bytes, image_id: str) -> Image.Image:
    if not encoded:
        raise CorruptImage(image_id, "it has 0 bytes")
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise CorruptImage(image_id, _too_large(f"{image.height} x {image.width} pixels"))
    return image


def _corrupt(image_id: str, error: Exception) -> CorruptImage:
    if isinstance(error, CorruptImage):
        return error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return CorruptImage(image_id, _too_large(str(error).partition(",")[0]))
    return CorruptImage(image_id, f"{type(error).__name__}: {error}")


def _too_large(what: str) -> str:
    return f"a decompression bomb or a scan too large to train on: {what}, and at most {MAX_PIXELS} are read"
