"""Greedy generation from the cache says what the whole forward pass would say, one argmax at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tcjax.compressors.base import Compressed
from tcjax.evaluate.generate import make_generate, make_prefill
from tcjax.vlm import Vlm, splice
from tests.tiny import QUERIES, VLM, VOCAB, batch_at

PROMPT, STEPS = 9, 5


@pytest.fixture(scope="module")
def model() -> Vlm:
    return VLM.build(nnx.Rngs(3))


def prompts(num: int = 4):
    """Left-padded prompts with their image first."""
    rng = np.random.default_rng(0)
    batch = batch_at(0, num)
    pad_B = np.arange(num) % 3
    valid_BS = np.arange(PROMPT) >= pad_B[:, None]
    first_BS = np.arange(PROMPT) - pad_B[:, None]
    return batch._replace(
        tokens_BS=rng.integers(0, VOCAB, (num, PROMPT)).astype(np.int32),
        is_image_BS=(first_BS >= 1) & (first_BS <= QUERIES),
        valid_BS=valid_BS,
        supervised_BS=None,
    )


def by_whole_passes(model: Vlm, batch, end: int) -> np.ndarray:
    """No cache: the whole sequence again for every token."""
    said = np.full((len(batch.tokens_BS), STEPS), end)
    done = np.zeros(len(said), bool)
    for step in range(STEPS):
        seq_BSD, valid_BS = model.embed(batch)
        next_B = np.asarray(model.llm.logits(model.llm(seq_BSD, valid_BS))[:, -1].argmax(-1))
        said[~done, step] = next_B[~done]
        done |= said[:, step] == end
        batch = batch._replace(
            tokens_BS=np.concatenate([batch.tokens_BS, said[:, step : step + 1]], 1),
            is_image_BS=np.pad(batch.is_image_BS, ((0, 0), (0, 1))),
            valid_BS=np.pad(batch.valid_BS, ((0, 0), (0, 1)), constant_values=True),
        )
    return said


def test_cached_generation_equals_whole_forward_passes(model):
    batch = prompts()
    never = VOCAB + 1
    said = np.asarray(make_generate(model, end=never)(batch, STEPS))
    np.testing.assert_array_equal(said, by_whole_passes(model, batch, never))


def test_a_row_says_nothing_after_its_end_mark_and_the_others_go_on(model):
    batch = prompts()
    free = np.asarray(make_generate(model, end=VOCAB + 1)(batch, STEPS))
    end = int(free[0, 1])
    said = np.asarray(make_generate(model, end=end)(batch, STEPS))
    np.testing.assert_array_equal(said, by_whole_passes(model, batch, end))
    assert (said[0, 1:] == end).all()


def test_a_row_ends_at_any_of_several_ids_and_repeats_it(model):
    batch = prompts()
    free = np.asarray(make_generate(model, end=())(batch, STEPS))
    np.testing.assert_array_equal(free, by_whole_passes(model, batch, VOCAB + 1))
    ends = (int(free[0, 1]), int(free[1, 2]))
    said = np.asarray(make_generate(model, end=ends)(batch, STEPS))
    for row, whole in zip(said, free, strict=True):
        first = next((step for step, token in enumerate(whole) if token in ends), STEPS - 1)
        np.testing.assert_array_equal(row, [*whole[: first + 1], *[whole[first]] * (STEPS - 1 - first)])


def test_a_shape_compiles_once(model):
    answer, compiled = make_generate(model, end=0), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    first = answer(prompts(), STEPS)
    assert any("backend_compile" in name for name in compiled)
    compiled.clear()
    again = answer(prompts(), STEPS)
    assert not any("backend_compile" in name for name in compiled)
    np.testing.assert_array_equal(first, again)


def test_prefill_gives_the_logits_of_the_first_answer_token(model):
    batch = prompts()
    seq_BSD, valid_BS = model.embed(batch)
    whole_BV = model.llm.logits(model.llm(seq_BSD, valid_BS))[:, -1]
    np.testing.assert_allclose(make_prefill(model)(batch), whole_BV, atol=1e-5)


def test_the_splice_is_literal():
    text_BSD = jnp.zeros((2, 5, 1))
    compressed = Compressed(jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]))
    is_image_BS = jnp.array([[False, True, True, False, False], [False, False, True, False, True]])
    seq_BSD, valid_BS = splice(text_BSD, compressed, is_image_BS, jnp.ones((2, 5), bool))
    np.testing.assert_array_equal(seq_BSD[..., 0], [[0, 1, 2, 0, 0], [0, 0, 3, 0, 4]])
    assert valid_BS.all()


def test_an_invalid_visual_token_is_hidden_from_the_text():
    text_BSD = jnp.zeros((1, 4, 1))
    compressed = Compressed(jnp.ones((1, 2, 1)), jnp.array([[True, False]]))
    is_image_BS = jnp.array([[True, True, False, False]])
    _, valid_BS = splice(text_BSD, compressed, is_image_BS, jnp.ones((1, 4), bool))
    np.testing.assert_array_equal(valid_BS, [[True, False, True, True]])


def test_images_in_a_batch_do_not_mix(model):
    batch = prompts()
    other = batch._replace(images_BYX3=np.concatenate([batch.images_BYX3[:1], batch.images_BYX3[1:] * -3]))
    prefill = make_prefill(model)
    np.testing.assert_allclose(prefill(batch)[0], prefill(other)[0], atol=1e-6)
    assert np.abs(prefill(batch)[1] - prefill(other)[1]).max() > 1e-4
