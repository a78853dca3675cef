"""Packed rows: the loss and the gradients of unpacked ones, no leakage, few holes, bad samples left out."""

import dataclasses

import numpy as np
import pytest

from tcjax.pipeline.packing import best_fit
from tcjax.train.loop import num_samples
from tests.memory import Memory, mixed, opened
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


def by_hand(sources, config, root, places):
    """The samples at `places`, each in a row of its own with room for as many images."""
    alone = make(dataclasses.replace(config, batching="rows"), root)
    samples, layout = alone.samples, dataclasses.replace(alone.layout, parts="")
    rows = [layout.row([samples[place.source].draw(place)], config.images * Q + config.text_length) for place in places]
    return layout.batch(rows)


@pytest.mark.parametrize("turns", [0, 1])
def test_packed_loss_and_gradients_are_those_of_unpacked_rows(tmp_path, monkeypatch, built, turns):
    sources = mixed("pictures", 30, most=2), Memory("text", [0] * 10, [[3, 2]] * 10)
    monkeypatch.setattr("tcjax.pipeline.packing.WINDOW", 20)
    config = opened(
        monkeypatch, tmp_path, *sources, weights=(2.0, 1.0), batching="packed", images=4, turns=turns, text_length=60
    )
    packed = make(config, tmp_path)
    batch = next(packed)
    places = [place for row in range(4) for place in packed.plan[row].places]
    assert len(places) == num_samples(batch) > 6
    assert {packed.samples[place.source].size(place)[1] for place in places} == {0, 1, 2}
    unpacked = by_hand(sources, config, tmp_path, places)
    assert unpacked.segment_BS is None and batch.segment_BS.max() > 1
    (together, grads), (alone, expected) = built(batch), built(unpacked)
    assert together.count == alone.count > 20
    np.testing.assert_allclose(together.total, alone.total, rtol=1e-6)
    assert together.correct == alone.correct
    assert difference(grads, expected) < 3e-6


def test_nothing_leaks_between_the_samples_of_a_row(tmp_path, monkeypatch, built):
    """Text, image and instruction of one sample change; no token of another has another loss, to the last bit."""
    config = opened(monkeypatch, tmp_path, mixed(num=30), batching="packed", images=3, text_length=60)
    batch = next(make(config, tmp_path))
    row = int(np.argmax(((batch.segment_BS == 2) & batch.is_image_BS).any(1) & (batch.segment_BS.max(1) > 2)))
    changed = (batch.segment_BS[row] == 2) & batch.valid_BS[row]
    images_before = int((batch.is_image_BS[row] & (batch.segment_BS[row] < 2)).sum()) // Q
    tokens_BS, images_BYX3 = batch.tokens_BS.copy(), batch.images_BYX3.copy()
    text = changed & ~batch.is_image_BS[row]
    tokens_BS[row, text] = (tokens_BS[row, text] + 7) % 60
    slot = row * 3 + images_before
    images_BYX3[slot] = -images_BYX3[slot]
    told_BT = batch.instruction_BT.copy()
    told_BT[slot, 0] = 9
    other = batch._replace(tokens_BS=tokens_BS, images_BYX3=images_BYX3, instruction_BT=told_BT)
    before_BS, after_BS = built.losses(batch), built.losses(other)
    of_changed_BS = np.zeros_like(batch.valid_BS)
    of_changed_BS[row] = changed
    of_changed_BS = of_changed_BS[:, 1:]
    np.testing.assert_array_equal(after_BS[~of_changed_BS], before_BS[~of_changed_BS])
    assert (after_BS[of_changed_BS] != before_BS[of_changed_BS]).any()
    only_image = built.losses(batch._replace(images_BYX3=images_BYX3))
    np.testing.assert_array_equal(only_image[~of_changed_BS], before_BS[~of_changed_BS])
    if built.kind != "told":
        assert (only_image[of_changed_BS] != before_BS[of_changed_BS]).any()


def test_positions_restart_with_every_sample(tmp_path, monkeypatch, resampling):
    """The first row's samples in another order: every one keeps its loss."""
    config = opened(monkeypatch, tmp_path, mixed(num=30), batching="packed", images=4, text_length=60)
    packed = make(config, tmp_path)
    places = packed.plan[0].places
    assert len(places) > 2
    layout, length = packed.layout, packed.plan[0].length
    rows = [
        layout.batch([layout.row([packed.samples[0].draw(place) for place in order], length)])
        for order in (places, places[::-1])
    ]
    forwards, backwards = (resampling.losses(row).sum() for row in rows)
    np.testing.assert_allclose(forwards, backwards, rtol=1e-6)


def test_a_bad_sample_of_a_packed_row_leaves_its_part_out_and_nothing_else_moves(tmp_path, monkeypatch):
    source = mixed(num=40)
    config = opened(monkeypatch, tmp_path, source, batching="packed", images=3, max_corrupt=0.2, text_length=60)
    whole = make(config, tmp_path)
    places = [place for row in range(4) for place in whole.plan[row].places]
    bad = next(place.index for place in places if source.images[place.index])
    before = next(whole)
    source.broken = {bad: "image"}
    fresh = make(config, tmp_path)
    after = next(fresh)
    assert fresh.skipped["corrupt_images"] == [f"mixed-{bad}"]
    assert num_samples(after) == num_samples(before) - 1
    assert after.valid_BS.shape == before.valid_BS.shape
    left_out = [bad in [place.index for place in whole.plan[row].places] for row in range(4)]
    kept = np.invert(left_out)
    np.testing.assert_array_equal(after.tokens_BS[kept], before.tokens_BS[kept])
    assert sorted(set(before.index_B) - set(after.index_B)) == [bad]


def test_known_bad_samples_are_never_planned(tmp_path, monkeypatch):
    digits = {3: 0, 7: 0, 5: 60}  # an answer without a word, one that is cut
    source = Memory("some", [1] * 20, [[digits.get(i, 4)] for i in range(20)], broken={11: "record"})
    config = opened(monkeypatch, tmp_path, source, batching="packed", images=2, max_corrupt=0.2)
    monkeypatch.setattr("tcjax.pipeline.packing.WINDOW", 20)
    batches = make(config, tmp_path)
    seen = {int(i) for _ in range(3) for i in next(batches).index_B}
    assert seen - {-1} == set(range(20)) - {3, 7, 11}
    assert (
        batches.report() == "left out: 1 bad_samples (some-11), 2 unsupervised (some-3, some-7), the ends of 1 answers"
    )
    assert batches.counts() == {
        "corrupt_images": 0,
        "bad_samples": 1,
        "unsupervised": 2,
        "dropped_turns": 0,
        "truncated_answers": 1,
    }


# best fit


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_loses_nothing_overfills_nothing_and_leaves_little(seed):
    random = np.random.default_rng(seed)
    sizes, images = random.integers(10, 400, 2000).tolist(), random.integers(0, 3, 2000).tolist()
    rows = best_fit(sizes, images, 1000, 8)
    assert sorted(item for row in rows for item in row) == list(range(2000))
    assert max(sum(sizes[item] for item in row) for row in rows) <= 1000
    assert max(sum(images[item] for item in row) for row in rows) <= 8
    assert sum(sizes) / (1000 * len(rows)) > 0.97
    assert rows == best_fit(sizes, images, 1000, 8)


def test_best_fit_by_hand():
    assert best_fit([5, 4, 3, 2, 1], [1, 0, 0, 1, 0], 8, 1) == [[0, 2], [3, 1, 4]]
    assert best_fit([4, 4], [1, 1], 8, 1) == [[0], [1]]  # room for both, a slot for one


def test_packing_fills_what_rows_leave_empty(tmp_path, monkeypatch):
    config = opened(monkeypatch, tmp_path, mixed(num=200), images=8, text_length=100)
    shares = {}
    for batching in ("rows", "packed"):
        batches = make(dataclasses.replace(config, batching=batching), tmp_path)
        shares[batching] = 1 - np.mean([next(batches).valid_BS.mean() for _ in range(5)])
    assert shares["rows"] > 0.7 and shares["packed"] < 0.1
