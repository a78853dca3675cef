"""Pixels of any image: those of transformers' processors and of Prismatic, without what a crop would throw away.

golden/geometry.npz holds what transformers 5.23's torchvision processors (torchvision 0.28, torch 2.13) and Prismatic's
LetterboxPad with torchvision's Resize and CenterCrop (commit 874c5bb) made of `picture_cases.shapes()`; the PIL processors
run here.
"""

import io
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tcjax.config import Pixels
from tcjax.pipeline import geometry, images
from tcjax.preprocessor import from_preprocessor
from tests.picture_cases import PROCESSORS, SIZES, encoded, kinds, noise, shapes

GOLDEN = Path(__file__).parent / "golden/geometry.npz"
CLASSES = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "Siglip2ImageProcessor": Siglip2ImageProcessorPil,
}
FILES = shapes() | kinds()


def pixels_of(case: str) -> Pixels:
    name, settings = PROCESSORS[case]
    return from_preprocessor({"image_processor_type": name, **settings})


@lru_cache
def processor(case: str):
    name, settings = PROCESSORS[case]
    return CLASSES[name](**settings, do_convert_rgb=True)


def off(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs.astype(int))


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_pil_processor(case):
    differences = []
    for name, file in FILES.items():
        with Image.open(io.BytesIO(file)) as image:
            if name == "sixteen bits":  # PIL makes everything above 255 white; we keep the high byte
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            out = processor(case)(image, do_rescale=False, do_normalize=False, return_tensors="np")
        ours, grid_2 = images.read(file, pixels_of(case), name)
        theirs = out["pixel_values"][0]
        if case == "naflex":
            assert grid_2.tolist() == out["spatial_shapes"][0].tolist()
            theirs = theirs.reshape(ours.shape)
        else:
            theirs = theirs.transpose(1, 2, 0)
        differences.append(off(ours, theirs).ravel())
    everywhere = np.concatenate(differences)
    assert everywhere.max() <= 1 and (everywhere > 0).mean() < 2e-3
    if case not in ("clip", "dinov2"):  # a crop computed alone is resized from a box of rounded edges
        assert everywhere.max() == 0


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_torchvision_processor(case):
    """Its weights have 16 bits. Pillow 13 resizes a tall image's rows first, torchvision never: more than a level apart."""
    differences = []
    with np.load(GOLDEN) as golden:
        for name in shapes():
            tall = name == "150x17" and case in ("siglip", "siglip2", "lanczos")
            ours = images.decode(FILES[name], pixels_of(case), name)
            if not tall:
                differences.append(off(ours, golden[f"{case} {name}"]).ravel())
    everywhere = np.concatenate(differences)
    assert everywhere.max() <= 2 and (everywhere > 1).mean() < 1e-3 and (everywhere > 0).mean() < 0.03


def test_the_letterbox_is_prismatics():
    fill = (0.485, 0.456, 0.406)
    pixels = Pixels(size_YX=(24, 24), mean=fill, geometry="letterbox")
    with np.load(GOLDEN) as golden:
        for name in shapes():
            ours = images.decode(FILES[name], pixels, name)
            assert off(ours, golden[f"letterbox {name}"]).max() <= 1, name


def test_the_normalised_pixels_are_the_processors():
    file = FILES["60x80"]
    for case in ("clip", "naflex"):
        with Image.open(io.BytesIO(file)) as image:
            theirs = processor(case)(image, return_tensors="np")["pixel_values"][0]
        values, grid_2 = images.read(file, pixels_of(case), "a")
        seen = images.normalise(values, pixels_of(case))
        if case == "naflex":
            taken = int(np.prod(grid_2))
            np.testing.assert_allclose(seen.reshape(theirs.shape)[:taken], theirs[:taken], atol=1e-6)
        else:
            np.testing.assert_allclose(seen.transpose(2, 0, 1), theirs, atol=1e-6)


def test_a_plan_worked_by_hand():
    pixels = Pixels(size_YX=(336, 336), geometry="crop")
    assert geometry.plan(480, 640, pixels) == ((480, 640), (0, 0), (336, 448), (0, 56, 336, 336))
    padded = Pixels(size_YX=(336, 336), geometry="pad")
    assert geometry.plan(480, 640, padded) == ((640, 640), (80, 0), (336, 336), (0, 0, 336, 336))
    # 100 x 103 leaves 3: one pixel on each side, and a canvas of 102 x 103, whose longer side is cut again.
    boxed = Pixels(size_YX=(336, 336), geometry="letterbox")
    assert geometry.plan(100, 103, boxed) == ((102, 103), (1, 0), (336, 339), (0, 2, 336, 336))
    assert geometry.patch_grid(480, 640, 16, 256) == (14, 18)
    assert all(np.prod(geometry.patch_grid(*size, 16, 256)) <= 256 for size in SIZES)


def test_patches_come_apart_and_together():
    pixels = pixels_of("naflex")
    values, grid_2 = images.read(FILES["60x80"], pixels, "a")
    assert values.shape == pixels.shape == (36, 16, 3) and not values[np.prod(grid_2) :].any()
    image_YX3 = images.shown(FILES["60x80"], pixels, "a")
    np.testing.assert_array_equal(geometry.assembled(values, grid_2, pixels), image_YX3)
    _, W = grid_2
    np.testing.assert_array_equal(values[W + 2], image_YX3[4:8, 8:12].reshape(16, 3))  # second row, third column


def test_a_window_alone_is_the_window_of_the_whole():
    rng = np.random.default_rng(2)
    for height, width in [(480, 640), (640, 500), (333, 500), (90, 61), (20, 30)]:
        image = Image.fromarray(noise(rng, height, width))
        for pixels in (pixels_of("clip"), pixels_of("dinov2")):
            way = geometry.plan(height, width, pixels)
            whole_YX3 = np.asarray(image.resize(way.resized_YX[::-1], Image.Resampling.BICUBIC))
            top, left, Y, X = way.window
            assert off(geometry.fit(image, pixels), whole_YX3[top : top + Y, left : left + X]).max() <= 1


def test_a_bomb_is_refused_by_name_before_it_is_decoded():
    """A PNG header alone says 20000 x 20000; the same for 9500 x 9500, which PIL would only warn of."""
    for side in (20_000, 9_500):
        small = encoded(Image.new("1", (8, 8)))
        header = small[:16] + side.to_bytes(4, "big") * 2
        check = zlib.crc32((header + small[24:29])[12:]).to_bytes(4, "big")
        with pytest.raises(images.CorruptImage, match=r"'board-7' cannot be read \(a decompression bomb"):
            images.decode(header + small[24:29] + check + small[33:], pixels_of("clip"), "board-7")


def test_a_square_too_large_to_pad_is_refused_by_name():
    line = encoded(Image.new("L", (20_000, 1)))
    with pytest.raises(images.CorruptImage, match=r"'thread'.*the square it is padded to has 20000 x 20000 pixels"):
        images.decode(line, pixels_of("llava"), "thread")
    assert images.decode(line, pixels_of("clip"), "thread").shape == (24, 24, 3)
