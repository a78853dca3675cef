"""Images as they lie on disk: every kind people have becomes RGB, and what would hurt is refused by name, from its header."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tcjax.config import Pixels
from tcjax.pipeline import images
from tcjax.pipeline.encoded import FORMATS, MAX_PIXELS, SUFFIXES, probe, rgb
from tcjax.pipeline.sample import CorruptImage
from tests.published import image


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def bomb(Y: int, X: int) -> bytes:
    """A PNG of 8 bits grey that says it has Y x X pixels, all black: some kilobytes for hundreds of megapixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer, rows = zlib.compressobj(9), bytearray()
    for _ in range(Y):
        rows += packer.compress(bytes(1 + X))
    rows += packer.flush()
    head = struct.pack(">IIBBBBB", X, Y, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", bytes(rows)) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_from_its_header(monkeypatch):
    small = bomb(20_000, 20_000)
    assert len(small) < 500_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("its pixels were allocated"))
    for Y, X, content in ((20_000, 20_000, small), (10_000, 9_500, bomb(10_000, 9_500))):
        for look in (probe, rgb):
            with pytest.raises(CorruptImage, match=rf"image 'b' .*decompression bomb.*at most {MAX_PIXELS} are"):
                look(content, "b")
        with pytest.raises(CorruptImage, match="decompression bomb"):
            images.decode(content, Pixels(size_YX=(4, 4)), "b")
        assert Y * X > MAX_PIXELS


def test_images_of_any_shape_down_to_one_pixel():
    one = encoded(Image.new("RGB", (1, 1), (10, 20, 30)))
    assert probe(one, "a") == ("PNG", (1, 1))
    np.testing.assert_array_equal(images.decode(one, Pixels(size_YX=(2, 3)), "a"), np.full((2, 3, 3), (10, 20, 30)))
    assert images.decode(image(0, size_YX=(1, 300)), Pixels(size_YX=(4, 4)), "a").shape == (4, 4, 3)
    assert probe(bomb(9_000, 9_900), "a") == ("PNG", (9_000, 9_900))  # large, but below the limit


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_and_known_by_its_bytes(kind):
    content = image(3, kind)
    assert probe(content, "a") == (kind, (6, 8))
    with Image.open(io.BytesIO(content)) as expected:
        np.testing.assert_array_equal(np.asarray(rgb(content, "a")), np.asarray(expected.convert("RGB")))
    assert SUFFIXES[kind][0].startswith(".")


def test_two_jpegs_in_one_file_are_the_first():
    pair = encoded(
        Image.new("RGB", (8, 8), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
    )
    assert probe(pair, "a")[0] in SUFFIXES
    assert np.asarray(rgb(pair, "a"))[0, 0, 0] > 250


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP"):
        content = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        np.testing.assert_array_equal(np.asarray(rgb(content, "a")), np.full((4, 4, 3), (255, 0, 0)))


def test_modes_become_rgb():
    grey_YX = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    grey = Image.fromarray(grey_YX)
    same_YX3 = np.repeat(grey_YX[..., None], 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(rgb(encoded(grey), "a")), same_YX3)
    sixteen = Image.fromarray(grey_YX.astype(np.uint16) * 256 + 255)
    np.testing.assert_array_equal(np.asarray(rgb(encoded(sixteen), "a")), same_YX3)
    np.testing.assert_array_equal(np.asarray(rgb(encoded(sixteen, "TIFF"), "a")), same_YX3)
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red_YX3 = np.asarray(rgb(cmyk, "a")).astype(int)
    assert np.abs(red_YX3 - (255, 0, 0)).max() <= 2
    bilevel = np.asarray(rgb(encoded(Image.fromarray(grey_YX > 100)), "a"))
    np.testing.assert_array_equal(bilevel, np.repeat((grey_YX > 100)[..., None] * np.uint8(255), 3, axis=-1))


def test_transparency_is_laid_on_white():
    half = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    np.testing.assert_array_equal(np.asarray(rgb(half, "a")), np.full((2, 2, 3), 255))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    content = encoded(palette, transparency=bytes([255, 0]))
    np.testing.assert_array_equal(np.asarray(rgb(content, "a")), [[[10, 20, 30], [255, 255, 255]]])


def test_the_orientation_mark_of_a_camera_is_ignored():
    marked = Image.Exif()
    marked[0x0112] = 6  # turned by 90 degrees
    content = encoded(Image.new("RGB", (8, 4), "red"), "JPEG", exif=marked)
    assert rgb(content, "a").size == (8, 4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's own, of a TIFF's tags, before it gives up
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_images_are_refused_by_name(kind):
    content = image(0, kind, size_YX=(64, 64))
    for length in (0, 2, 20, len(content) // 2):
        with pytest.raises(CorruptImage, match=r"image 'cut' cannot be read \(") as caught:
            rgb(content[:length], "cut")
        assert caught.value.image_id == "cut"


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n", b"GIF89a"]
)
def test_what_is_no_image_is_refused(content):
    with pytest.raises(CorruptImage, match="image 'x' cannot be read"):
        rgb(content, "x")
