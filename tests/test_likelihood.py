"""Likelihoods from one cache of the prompt equal those of whole forward passes; a stream says what a batch says."""

import jax
import numpy as np
import pytest
from flax import nnx

from tcjax.evaluate.generate import make_generate
from tcjax.evaluate.likelihood import make_likelihood
from tcjax.evaluate.stream import make_stream
from tcjax.vlm import Vlm
from tests.test_generate import prompts
from tests.tiny import VLM, VOCAB

CHOICES = [[3], [5, 2, 7], [5, 2, 8, 1], [11, 4]]


@pytest.fixture(scope="module")
def model() -> Vlm:
    return VLM.build(nnx.Rngs(3))


def by_whole_passes(model: Vlm, batch, choice: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The prompt and the choice as one sequence, no cache."""
    B, T = len(batch.tokens_BS), len(choice)
    batch = batch._replace(
        tokens_BS=np.concatenate([batch.tokens_BS, np.tile(np.array(choice, np.int32), (B, 1))], 1),
        is_image_BS=np.pad(batch.is_image_BS, ((0, 0), (0, T))),
        valid_BS=np.pad(batch.valid_BS, ((0, 0), (0, T)), constant_values=True),
    )
    logits_BSV = model.llm.logits(model.llm(*model.embed(batch)))[:, -T - 1 : -1]
    logp_BTV = np.asarray(jax.nn.log_softmax(logits_BSV))
    greedy_B = (np.asarray(logits_BSV.argmax(-1)) == choice).all(1)
    return logp_BTV[:, np.arange(T), choice].sum(1), greedy_B


@pytest.mark.parametrize("num", [1, 3])
def test_likelihoods_equal_whole_forward_passes(model, num, monkeypatch):
    monkeypatch.setattr("tcjax.evaluate.likelihood.TOGETHER", 3 * num)  # four choices in two chunks
    batch = prompts(num)
    found = make_likelihood(model)(batch, CHOICES)
    assert found.total.shape == found.greedy.shape == (num, len(CHOICES))
    for column, choice in enumerate(CHOICES):
        total_B, greedy_B = by_whole_passes(model, batch, choice)
        np.testing.assert_allclose(found.total[:, column], total_B, atol=1e-5)
        np.testing.assert_array_equal(found.greedy[:, column], greedy_B)


def test_what_is_generated_is_greedy_and_the_rest_is_not(model):
    batch = prompts(1)
    said = np.asarray(make_generate(model, end=VOCAB + 1)(batch, 3))[0].tolist()
    other = [*said[:2], (said[2] + 1) % VOCAB]
    found = make_likelihood(model)(batch, [said, said[:1], other])
    assert found.greedy.tolist() == [[True, True, False]] and found.total[0, 0] > found.total[0, 2]


def test_a_choice_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="every choice needs at least one token"):
        make_likelihood(model)(prompts(1), [[1], []])


def test_a_stream_says_what_a_batch_says_and_stops_at_the_end_mark(model):
    batch = prompts(1)
    free = np.asarray(make_generate(model, end=VOCAB + 1)(batch, 5))[0].tolist()
    assert list(make_stream(model, end=VOCAB + 1)(batch, 5)) == free
    end = free[2]
    assert list(make_stream(model, end=end)(batch, 5)) == free[: free.index(end)]


def test_a_stream_compiles_once(model):
    stream, compiled = make_stream(model, end=VOCAB + 1), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    list(stream(prompts(1), 4))
    assert any("backend_compile" in name for name in compiled)
    compiled.clear()
    list(stream(prompts(1), 4))
    assert not any("backend_compile" in name for name in compiled)
