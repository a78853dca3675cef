"""The cache of tower features: a hit is the tower itself, a kill costs a shard, another tower is another folder."""

import dataclasses
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tcjax.config import Pixels
from tcjax.pipeline import images
from tcjax.train import feature_store, features
from tcjax.train.features import cached_features, feature_key
from tests.picture_cases import shapes
from tests.tiny import TOWER

NUM = 21
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 16, 16, 3), dtype=np.uint8)
FACTS = {"tower": "a", "dataset": "b"}
PIXELS = TOWER.pixels


@pytest.fixture
def tower(monkeypatch):
    """Passes of 4 images per device, shards of 4 records."""
    monkeypatch.setattr(features, "BATCH", 4)
    monkeypatch.setattr(feature_store, "STEP", 4)
    monkeypatch.setattr(feature_store, "_MOST_RECORDS", 4)
    return TOWER.build(nnx.Rngs(0))


def one(index: int):
    return [(IMAGES[index], None)]


def made(tower, read, folder, num=NUM, **options):
    return cached_features(tower, options.pop("pixels", PIXELS), read, num, folder=folder, facts=FACTS, **options)


def inline(tower, dtype=np.float32):
    return np.asarray(jax.jit(lambda x: tower(x))(IMAGES)).astype(dtype)


def files(folder):
    (place,) = folder.iterdir()
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_a_hit_equals_the_tower_inline(tmp_path, tower):
    cache = made(tower, one, tmp_path)
    assert len(cache) == NUM and cache.shape == (16, 16) and cache.dtype == np.float32
    tokens = np.stack([cache(i) for i in range(NUM)])
    np.testing.assert_allclose(tokens, inline(tower), atol=1e-6)
    again = made(tower, lambda i: pytest.fail("read"), tmp_path)
    np.testing.assert_array_equal(np.stack([again(i, 0) for i in range(NUM)]), tokens)
    alone = jax.jit(lambda x: tower(x))(IMAGES[4:8])
    np.testing.assert_array_equal(tokens[4:8], alone)


def test_a_hit_in_bfloat16_is_the_float32_hit_rounded(tmp_path, tower):
    exact, narrow = made(tower, one, tmp_path / "a"), made(tower, one, tmp_path / "b", dtype="bfloat16")
    assert narrow.dtype == ml_dtypes.bfloat16 and narrow.layout.image_bytes == 2 * 16 * 16
    for index in range(NUM):
        np.testing.assert_array_equal(narrow(index), exact(index).astype(ml_dtypes.bfloat16))
    assert {path.name for path in (tmp_path / "a").iterdir()} != {path.name for path in (tmp_path / "b").iterdir()}


def test_any_number_of_processes_and_threads_write_the_same_bytes(tmp_path, tower):
    for count in (1, 2, 4):
        for process in reversed(range(count)):
            call = dict(process_index=process, process_count=count, threads=count - 1)
            if process:
                with pytest.raises(ValueError, match=r"lacks \d of 6 shards"):
                    made(tower, one, tmp_path / str(count), **call)
            else:
                made(tower, one, tmp_path / str(count), **call)
    assert len(files(tmp_path / "1")) == 6 + 2
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "4")


def test_a_build_that_was_killed_goes_on_with_whole_shards(tmp_path, tower):
    def until_ten(i: int):
        if i == 10:
            raise KeyboardInterrupt
        return one(i)

    with pytest.raises(KeyboardInterrupt):
        made(tower, until_ten, tmp_path / "killed")
    seen = []
    made(tower, lambda i: seen.append(i) or one(i), tmp_path / "killed", process_count=1)
    assert sorted(seen) == list(range(8, NUM))
    made(tower, one, tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_records_hold_no_image_or_several(tmp_path, tower):
    def read(i: int):
        return [(IMAGES[i], None)] * (i % 3)

    cache = made(tower, read, tmp_path, num=9)
    assert [cache.num_images(i) for i in range(9)] == [0, 1, 2] * 3
    assert cache.readable(0) and cache(5, 1).shape == (16, 16)
    np.testing.assert_allclose(cache(5, 1), inline(tower)[5], atol=1e-6)
    with pytest.raises(IndexError, match=r"record 4 has 1 images in .*, and number 1 is asked for"):
        cache(4, 1)
    with pytest.raises(IndexError, match=r"record 9 of 9"):
        cache(9)


def test_an_unreadable_image_is_a_row_of_nan(tmp_path, tower):
    cache = made(tower, lambda i: [None] if i == 3 else one(i), tmp_path)
    assert np.isnan(cache(3)).all() and not cache.readable(3)
    assert all(cache.readable(i) for i in range(NUM) if i != 3)


def test_nothing_readable_is_an_error(tmp_path, tower):
    with pytest.raises(ValueError, match="none of the 21 images can be read"):
        made(tower, lambda i: [None], tmp_path)


class Patches(nnx.Module):
    """Hands over what it is given: the mean of every patch, and the grid in its first token."""

    def __call__(self, images_BYX3, grids_B2):
        means_BNC = images_BYX3.astype(np.float32).mean(2)
        return means_BNC.at[:, 0, :2].set(grids_B2)


def test_images_of_any_shape_keep_their_grids(tmp_path, tower):
    pixels = Pixels(size_YX=(24, 24), geometry="naflex", resample="bilinear", patch=4, max_patches=36)
    seen = [images.read(file, pixels, name) for name, file in shapes().items()]
    cache = made(Patches(), lambda i: [seen[i], None], tmp_path, num=9, pixels=pixels)
    for index in range(9):
        rows, grid_2 = seen[index]
        np.testing.assert_array_equal(cache.grid(index), grid_2)
        np.testing.assert_array_equal(cache(index)[0, :2], grid_2)
        np.testing.assert_allclose(cache(index)[1:], rows.mean(1)[1:], rtol=1e-6)
        assert cache.grid(index, 1).tolist() == [0, 0] and np.isnan(cache(index, 1)).all()


def test_a_disk_too_small_is_said_before_anything_is_computed(tmp_path, tower, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match=r"21 records take 0.0 GB more \(16 x 16 float32 = 0.00 MB each.*0.0 GB free"):
        made(tower, lambda i: pytest.fail("read"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_type_that_is_unknown_is_refused(tmp_path, tower):
    with pytest.raises(ValueError, match=r"feature_cache='float16' is unknown; possible: .*'bfloat16', 'float32'"):
        made(tower, one, tmp_path, dtype="float16")


def test_shards_of_clip_are_a_gigabyte():
    layout = feature_store.Layout(shape=(576, 1024), dtype="bfloat16", grids=False, records=558_128)
    assert layout.image_bytes == 1_179_648
    assert (layout.per_shard, layout.num_shards) == (896, 623)
    assert len(layout.span(622)) == 558_128 - 622 * 896


def test_the_key_sees_every_fact():
    keys = {feature_key(f) for f in (FACTS, FACTS | {"tower": "c"}, FACTS | {"dataset": "d"}, FACTS | {"images": 3})}
    assert len(keys) == 4


def test_a_narrow_tower_gives_what_it_gives_inline(tmp_path, tower):
    """Weights in bfloat16: bytes are normalised in float32 and rounded once, as float32 pixels would be."""
    graphdef, state = nnx.split(dataclasses.replace(TOWER, layers=1).build(nnx.Rngs(0)))
    narrow = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), state))
    cache = made(narrow, one, tmp_path, dtype="bfloat16", num=4)
    pixels = images.normalise(IMAGES[:4], PIXELS).astype(ml_dtypes.bfloat16)
    theirs = np.asarray(jax.jit(lambda x: narrow(x))(pixels))
    assert theirs.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.stack([cache(i) for i in range(4)]), theirs)
