"""Small images of many shapes and kinds, and the processors whose pixels ours must be."""

import io

import numpy as np
from PIL import Image

SIZES = [(1, 1), (1, 1000), (1000, 1), (2, 3), (24, 24), (28, 28), (25, 24), (24, 39), (60, 80), (80, 60), (83, 125)]
SIZES += [(101, 100), (100, 103), (37, 211), (150, 17), (56, 57)]


def noise(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Tiles of one colour with grain on them: edges that overshoot, and values at both ends."""
    tiles = rng.integers(0, 256, (height // 7 + 1, width // 7 + 1, channels))
    image = tiles.repeat(7, 0).repeat(7, 1)[:height, :width] + rng.integers(-60, 60, (height, width, channels))
    return image.clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shapes() -> dict[str, bytes]:
    """PNG files of `SIZES`, named 60x80 and so on."""
    rng = np.random.default_rng(0)
    return {f"{Y}x{X}": encoded(Image.fromarray(noise(rng, Y, X))) for Y, X in SIZES}


def kinds() -> dict[str, bytes]:
    """A picture of 30 x 45 in every mode people's files have."""
    rng = np.random.default_rng(1)
    image_YX3 = noise(rng, 30, 45)
    rgb, grey = Image.fromarray(image_YX3), Image.fromarray(image_YX3[..., 0])
    palette, colour = rgb.quantize(16), tuple(image_YX3[0, 0].tolist())
    return {
        "grey": encoded(grey),
        "grey with transparency": encoded(grey.convert("LA")),
        "one bit": encoded(grey.convert("1")),
        "sixteen bits": encoded(Image.fromarray(rng.integers(0, 2**16, (30, 45)).astype(np.uint16))),
        "palette": encoded(palette),
        "palette with transparency": encoded(palette, transparency=3),
        "a transparent colour": encoded(rgb, transparency=colour),
        "rgba": encoded(Image.fromarray(noise(rng, 30, 45, 4))),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg": encoded(rgb, "JPEG", quality=90),
        "gif": encoded(rgb, "GIF"),
        "webp": encoded(rgb, "WEBP", lossless=True),
    }


_CROP = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
PROCESSORS = {  # settings of the published class; sizes are small so that much is enlarged and much shrunk
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 24}, **_CROP}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 28}, **_CROP}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 24, "width": 24}}),
    "siglip2": ("SiglipImageProcessor", {"size": {"height": 24, "width": 24}, "resample": 2}),
    "lanczos": ("SiglipImageProcessor", {"size": {"height": 24, "width": 24}, "resample": 1}),
    "llava": ("LlavaImageProcessor", {"size": {"shortest_edge": 24}, "do_pad": True, **_CROP}),
    "naflex": ("Siglip2ImageProcessor", {"patch_size": 4, "max_num_patches": 36}),
}
