"""Packed rows: the loss and the gradients of unpacked ones, no leakage, few holes; and what rows of several images are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tcjax.batch import OF_ROWS, Batch
from tcjax.compressors import avg_pool, resampler
from tcjax.config import MeshConfig
from tcjax.pipeline import images
from tcjax.pipeline.input import make_input
from tcjax.pipeline.packing import best_fit
from tcjax.sharding import make_mesh, place_batch
from tcjax.train.loop import num_samples
from tests.memory import PIXELS, Memory, mixed, opened
from tests.test_instructions import Hearing
from tests.tiny import LLM, VLM

Q = 4
COMPRESSORS = {
    "resampler": resampler.Config(num_queries=Q, depth=1, heads=2, head_width=8),
    "pooled": avg_pool.Config(num_queries=Q),
    "told": Hearing(),
}


@dataclasses.dataclass
class Built:
    """A tiny VLM; terms and gradients of its compressor, compiled per shape of batch."""

    kind: str

    def __post_init__(self):
        config = dataclasses.replace(VLM, compressor=COMPRESSORS[self.kind], llm=dataclasses.replace(LLM, vocab=64))
        self.model = config.build(nnx.Rngs(1))
        graphdef, self.state = nnx.split(self.model)

        def total(state, batch):
            terms = nnx.merge(graphdef, state).loss_terms(batch, jax.random.key(0), jnp.float32(0.5))
            return terms.total, terms

        def losses(state, batch):
            model = nnx.merge(graphdef, state)
            seq_BSD, valid_BS = model.embed(batch)
            logits_BSV = model.llm.logits(model.llm(seq_BSD, valid_BS, batch.segment_BS))
            logp_BSV = jax.nn.log_softmax(logits_BSV[:, :-1])
            picked_BS = jnp.take_along_axis(logp_BSV, batch.tokens_BS[:, 1:, None], axis=-1)[..., 0]
            return jnp.where(batch.supervised_BS[:, 1:], -picked_BS, 0)

        self._gradient = jax.jit(jax.grad(total, has_aux=True, allow_int=True))
        self._losses = jax.jit(losses)

    def __call__(self, batch: Batch):
        grads, terms = self._gradient(self.state, batch)
        return terms, jax.tree.leaves(grads["compressor"])

    def losses(self, batch: Batch) -> np.ndarray:
        """[rows, S - 1]: of every supervised token."""
        return np.asarray(self._losses(self.state, batch))


@pytest.fixture(scope="module", params=list(COMPRESSORS))
def built(request):
    return Built(request.param)


def difference(grads, expected) -> float:
    """Norm of the difference of two gradients, as a share of the expected one's norm."""
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (grads, expected))
    assert np.linalg.norm(theirs) > 0
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr("tcjax.pipeline.packing.WINDOW", 40)


@pytest.fixture(scope="module")
def resampling():
    return Built("resampler")


def make(config, root, **options):
    return make_input(config, PIXELS, Q, root=root, instructed=True, **options)


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
    source = Memory("some", [1] * 20, [[60] if i in (3, 7) else [4] for i in range(20)], broken={11: "record"})
    config = opened(monkeypatch, tmp_path, source, batching="packed", images=2, max_corrupt=0.2)
    monkeypatch.setattr("tcjax.pipeline.packing.WINDOW", 20)
    batches = make(config, tmp_path)
    seen = {int(i) for _ in range(3) for i in next(batches).index_B}
    assert seen - {-1} == set(range(20)) - {3, 7, 11}
    assert batches.counts() == {
        "corrupt_images": 0,
        "bad_samples": 1,
        "unsupervised": 2,
        "dropped_turns": 0,
        "truncated_answers": 0,
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


# rows of several images


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


# every compressor


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
