"""Turns that do not see each other: one row with the image once equals one row per question, and nothing leaks."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.digit_boards import vocabulary
from tcjax.batch import Batch
from tcjax.pipeline.chat import Chat, Turn
from tests.tiny import LLM, QUERIES, VLM

TURNS = [Turn("colour of 7 ?", "red"), Turn("read word ?", "4 7 1 9"), Turn("any 3 ?", "no")]
IMAGES = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(VLM, llm=dataclasses.replace(LLM, vocab=64))
    return config.build(nnx.Rngs(1))


def batch_of(turns, *, independent: bool = True) -> Batch:
    row = Chat(vocabulary.tokenizer()).render(turns, num_queries=QUERIES, text_length=40)
    rows = (row.tokens_S, row.is_image_S, row.supervised_S, row.valid_S, row.segment_S)
    tokens, is_image, supervised, valid, segment = (column[None] for column in rows)
    return Batch(
        tokens_BS=tokens,
        is_image_BS=is_image,
        supervised_BS=supervised,
        valid_BS=valid,
        segment_BS=segment if independent else None,
        images_BYX3=IMAGES,
    )


def test_segments_are_literal():
    segment_S = batch_of(TURNS[:2]).segment_BS[0]
    shared, first, second = 1 + QUERIES, 1 + 4 + 1 + 2, 1 + 3 + 1 + 5  # <user> question <assistant> answer <end>
    np.testing.assert_array_equal(segment_S[: shared + first + second], [0] * shared + [1] * first + [2] * second)


def test_one_row_equals_one_row_per_turn(model):
    together = model.loss_terms(batch_of(TURNS))
    alone = [model.loss_terms(batch_of([turn])) for turn in TURNS]
    assert together.count == sum(terms.count for terms in alone) == 2 + 5 + 2
    np.testing.assert_allclose(together.total, sum(terms.total for terms in alone), rtol=1e-5)


def test_the_order_of_the_turns_changes_nothing(model):
    forwards, backwards = model.loss_terms(batch_of(TURNS)), model.loss_terms(batch_of(TURNS[::-1]))
    np.testing.assert_allclose(forwards.total, backwards.total, rtol=1e-5)


def test_another_turn_before_it_does_not_leak_into_a_turn(model):
    other = [Turn("count red ?", "3"), *TURNS[1:]]
    seen = []
    for turns in (TURNS, other):
        batch = batch_of(turns)
        seq_BSD, valid_BS = model.embed(batch)
        hidden_BSD = np.asarray(model.llm(seq_BSD, valid_BS, batch.segment_BS))[0]
        seen.append(hidden_BSD[(batch.segment_BS[0] == 2) & batch.valid_BS[0]])
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-6)


def test_a_conversation_does_let_later_turns_see_earlier_ones(model):
    conversation = model.loss_terms(batch_of(TURNS, independent=False))
    alone = sum(model.loss_terms(batch_of([turn])).total for turn in TURNS)
    assert abs(conversation.total - alone) > 1e-3


def test_a_single_turn_is_the_same_either_way(model):
    one = [model.loss_terms(batch_of(TURNS[:1], independent=independent)).total for independent in (True, False)]
    np.testing.assert_allclose(one[0], one[1], rtol=1e-6)
    assert jnp.isfinite(one[0])
