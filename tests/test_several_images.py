"""Rows of several images or none: in their order, blank slots felt by nobody, cut into microbatches and over devices whole."""

import dataclasses

import jax
import numpy as np
import pytest

from tcjax.batch import OF_ROWS, Batch
from tcjax.config import MeshConfig
from tcjax.pipeline import images
from tcjax.sharding import make_mesh, place_batch
from tests.memory import PIXELS, Memory, mixed, opened
from tests.tiny_packed import COMPRESSORS, Built, Q, difference, make


@pytest.fixture(scope="module", params=list(COMPRESSORS))
def built(request):
    return Built(request.param)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr("tcjax.pipeline.packing.WINDOW", 40)


@pytest.fixture(scope="module")
def resampling():
    return Built("resampler")


def rows_of(monkeypatch, root, pictures, answers, **changes) -> Batch:
    source = Memory("rows", pictures, answers)
    config = opened(monkeypatch, root, source, batch=len(pictures), **changes)
    return next(make(config, root))


def test_a_row_holds_its_images_in_their_order_and_blanks_behind(tmp_path, monkeypatch):
    batch = rows_of(monkeypatch, tmp_path, [2, 0, 1, 3], [[2]] * 4, images=3)
    assert batch.images_BYX3.shape == (12, 16, 16, 3) and batch.index_B.shape == (12,)
    assert batch.tokens_BS.shape == (4, 3 * Q + 44)
    images_BR = batch.is_image_BS.sum(1) // Q
    for row, num in enumerate(images_BR):
        index_R = batch.index_B[3 * row : 3 * row + 3]
        record = int(np.flatnonzero(np.array([2, 0, 1, 3]) == num)[0])
        assert index_R.tolist() == [record + 4 * number for number in range(num)] + [-1] * (3 - num)
        assert not batch.images_BYX3[3 * row + num : 3 * row + 3].any()
        assert (batch.instruction_BT[3 * row + num : 3 * row + 3] == -1).all()
        assert (batch.instruction_BT[3 * row : 3 * row + num, 0] >= 0).all()
        assert batch.images_BYX3[3 * row : 3 * row + num].any(axis=(1, 2, 3)).all()


def test_what_a_blank_slot_holds_changes_nothing(tmp_path, monkeypatch, built):
    batch = rows_of(monkeypatch, tmp_path, [2, 0, 1, 0], [[2], [3], [4], [1]], images=2)
    blank = batch.index_B == -1
    assert blank.sum() == 5
    noise = np.random.default_rng(0).integers(0, 256, batch.images_BYX3.shape, np.uint8)
    filled = batch._replace(
        images_BYX3=np.where(blank[:, None, None, None], noise, batch.images_BYX3),
        instruction_BT=np.where(blank[:, None], 5, batch.instruction_BT),
    )
    (terms, grads), (others, expected) = built(batch), built(filled)
    assert terms.total == others.total and terms.count == others.count
    assert difference(grads, expected) < 3e-6


def test_a_row_of_two_images_reads_them_in_their_order(tmp_path, monkeypatch, resampling):
    batch = rows_of(monkeypatch, tmp_path, [2, 2], [[3], [4]], images=2)
    seq_BSD, _ = resampling.model.embed(batch)
    tokens_BQD = resampling.model.compress(batch).tokens_BQD
    for row in range(2):
        visual_QD = np.asarray(seq_BSD)[row][batch.is_image_BS[row]]
        np.testing.assert_allclose(visual_QD, np.concatenate(tokens_BQD[2 * row : 2 * row + 2]), atol=1e-6)
    swapped = batch._replace(images_BYX3=batch.images_BYX3[[1, 0, 3, 2]])
    assert abs(resampling(batch)[0].total - resampling(swapped)[0].total) > 1e-4


def test_left_and_right_padding_give_the_same_loss(tmp_path, monkeypatch, built):
    batch = rows_of(monkeypatch, tmp_path, [2, 0, 1], [[5, 2], [3], [1]], images=2)
    empty_B = (~batch.valid_BS).sum(1)
    assert empty_B.min() > 0
    left = batch._replace(
        **{
            name: np.stack([np.roll(row, n) for row, n in zip(getattr(batch, name), empty_B, strict=True)])
            for name in OF_ROWS
            if getattr(batch, name) is not None
        }
    )
    (terms, grads), (others, expected) = built(batch), built(left)
    assert terms.count == others.count
    np.testing.assert_allclose(terms.total, others.total, rtol=1e-6)
    assert difference(grads, expected) < 3e-6


@pytest.mark.parametrize("batching", ["rows", "grouped", "packed"])
def test_a_sample_too_long_loses_turns_and_never_an_image(tmp_path, monkeypatch, batching):
    monkeypatch.setattr("tcjax.pipeline.packing.WINDOW", 4)
    source = Memory("long", [1, 2, 1, 2], [[3, 30], [2, 40], [2, 30], [3, 50]])
    config = opened(monkeypatch, tmp_path, source, batching=batching, images=2, text_length=18, batch=2)
    batches = make(config, tmp_path)
    seen = [next(batches) for _ in range(2)]
    assert sum(int(batch.is_image_BS.sum()) for batch in seen) == Q * 6
    assert all(batch.supervised_BS.any(1).all() for batch in seen)
    assert batches.dropped_turns == 4 == batches.counts()["dropped_turns"]
    assert batches.report() == "left out: 4 turns that did not fit"


@pytest.mark.parametrize("accumulate", [2, 4])
def test_microbatches_keep_a_rows_images_with_it(tmp_path, monkeypatch, resampling, accumulate):
    from tcjax.train.step import _accumulated

    batch = rows_of(monkeypatch, tmp_path, [2, 0, 1, 2, 1, 0, 2, 1], [[n] for n in range(1, 9)], images=2)

    def gradient(trainable, frozen, part):
        assert len(part.images_BYX3) == 2 * len(part.tokens_BS) == 16 // accumulate
        return resampling._gradient(trainable, part)

    grads, terms = jax.jit(lambda state: _accumulated(gradient, state, None, batch, accumulate))(resampling.state)
    whole, expected = resampling(batch)
    assert terms.count == whole.count
    np.testing.assert_allclose(terms.total, whole.total, rtol=1e-6)
    assert difference(jax.tree.leaves(grads["compressor"]), expected) < 3e-6


def test_rows_and_their_images_lie_on_the_same_devices(tmp_path, monkeypatch, resampling):
    batch = rows_of(monkeypatch, tmp_path, [2, 0, 1, 2, 1, 0, 2, 1], [[n] for n in range(1, 9)], images=2)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    placed = place_batch(batch, mesh)
    rows = {shard.device: shard.index[0] for shard in placed.tokens_BS.addressable_shards}
    for shard in placed.images_BYX3.addressable_shards:
        row = rows[shard.device]
        assert (shard.index[0].start, shard.index[0].stop) == (2 * (row.start or 0), 2 * row.stop)
    np.testing.assert_allclose(resampling(placed)[0].total, resampling(batch)[0].total, rtol=1e-6)


def test_cached_features_of_several_images(tmp_path, monkeypatch, resampling):
    """A cache that knows (record, image number) gives the batch that the images themselves give."""
    source = mixed(num=30, most=2)
    config = opened(monkeypatch, tmp_path, source, batching="packed", images=3, text_length=60)
    plain = next(make(config, tmp_path))

    tower = jax.jit(resampling.model.tower)

    class Cached:
        shape, dtype = (16, 16), np.dtype(np.float32)

        def __call__(self, index, number):
            return np.asarray(tower(images.decode(source[index].images[number], PIXELS, "")[None])[0])

        def grid(self, index, number):
            return None

    cached = next(make(config, tmp_path, features=Cached()))
    assert cached.images_BYX3 is None and cached.features_BNC.shape == (12, 16, 16)
    np.testing.assert_array_equal(cached.index_B, plain.index_B)
    np.testing.assert_allclose(resampling(cached)[0].total, resampling(plain)[0].total, rtol=1e-5)
    source.images[:] = [2] * 30
    with pytest.raises(ValueError, match="one per record is cached"):
        next(make(dataclasses.replace(config, text_length=61), tmp_path, features=np.zeros((30, 16, 16), np.float32)))
