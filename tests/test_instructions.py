"""The question on its way to the compressor: its ids alone, never an answer's; one turn per row; the controls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.digit_boards import vocabulary
from tcjax.compressors.base import Compressed, Compressor, CompressorConfig, read_text
from tcjax.pipeline.chat import Chat, Turn, fitted
from tcjax.pipeline.input import make_input
from tcjax.pipeline.questions import questions
from tcjax.pipeline.source import open_source
from tests.tiny import VLM, batch_at
from tests.tiny_boards import PIXELS, SOURCE, data_config, make_project

TURNS = [Turn("colour of 7 ?", "red"), Turn("read word ?", "4 7 1 9")]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def chat():
    return Chat(vocabulary.tokenizer())


def read(project, num, **changes):
    batches = make_input(data_config(**changes), PIXELS, 3, root=project, instructed=True)
    return [next(batches) for _ in range(num)], batches


def test_the_instruction_is_the_kept_questions_and_nothing_else(chat):
    row = chat.render(TURNS, num_queries=3, text_length=22)
    assert row.instruction == (*chat.encode("colour of 7 ?"), *chat.encode("read word ?"))
    cut = chat.render(TURNS, num_queries=3, text_length=12)
    assert (cut.dropped, cut.instruction) == (1, chat.encode("colour of 7 ?"))


def test_a_long_instruction_loses_its_beginning():
    np.testing.assert_array_equal(fitted((5, 6, 7), 5), [5, 6, 7, -1, -1])
    np.testing.assert_array_equal(fitted((5, 6, 7), 2), [6, 7])


def test_no_answer_reaches_the_instruction(project, chat):
    (batch,), _ = read(project, 1)
    prepared = open_source(project, SOURCE)
    for row, index in enumerate(batch.index_B):
        asked = [turn.question for turn in prepared[int(index)].turns]
        ids = [int(i) for i in batch.instruction_BT[row] if i >= 0]
        assert ids == [i for question in asked for i in chat.encode(question)][-64:]


def test_one_turn_is_drawn_anew_every_epoch_and_resumes(project):
    batches, source = read(project, 12, turns=1)  # two epochs of 24 boards
    by_board: dict[int, set] = {}
    for batch in batches:
        for row, index in enumerate(batch.index_B):
            assert (batch.tokens_BS[row] == 3).sum() == 1  # one <user> mark
            by_board.setdefault(int(index), set()).add(tuple(batch.instruction_BT[row]))
    assert len(by_board) == 24
    assert sum(len(drawn) == 2 for drawn in by_board.values()) > 12
    state = source.get_state()
    following = next(source)
    again, other = read(project, 5, turns=1)
    other.set_state(state)
    resumed = next(other)
    np.testing.assert_array_equal(resumed.tokens_BS, following.tokens_BS)
    np.testing.assert_array_equal(again[0].instruction_BT, batches[0].instruction_BT)


def test_without_a_reader_there_is_no_instruction(project):
    assert next(make_input(data_config(), PIXELS, 3, root=project)).instruction_BT is None


def test_negative_turns_are_refused(project):
    with pytest.raises(ValueError, match=r"data.turns=-1: takes a whole number"):
        read(project, 1, turns=-1)


def test_the_text_controls_change_what_the_compressor_hears_only(project, chat):
    asked = questions(open_source(project, dataclasses.replace(SOURCE, split="test")), chat, num_queries=3)
    heard = [tuple(int(i) for i in row if i >= 0) for row in asked.instruction_BT]
    assert heard == [chat.encode(question) for question in asked.question_B.tolist()]
    silent, other = asked.without_text(), asked.with_other_text()
    assert (silent.instruction_BT == -1).all()
    assert (other.instruction_BT != asked.instruction_BT).any(1).all()
    for changed in (silent, other):
        np.testing.assert_array_equal(changed.tokens_BS, asked.tokens_BS)


@dataclasses.dataclass(frozen=True)
class Hearing(CompressorConfig):
    """Says the mean of the text it was told."""

    needs = ("text",)

    def outputs(self, widths):
        return 4

    def build(self, widths, rngs):
        return Heard(widths)


class Heard(Compressor):
    def __init__(self, widths):
        self.widths, self.num_outputs = widths, 4
        self.gain = nnx.Param(jnp.ones(()), axes="")

    def __call__(self, tokens_BNC, context):
        text_BTD, valid_BT = read_text(context, self.widths)
        mean_BD = text_BTD.sum(1) / jnp.maximum(valid_BT.sum(1), 1)[:, None]
        return Compressed(jnp.repeat(self.gain[...] * mean_BD[:, None], 4, axis=1))


def test_the_compressor_hears_the_llms_own_embeddings():
    model = dataclasses.replace(VLM, compressor=Hearing()).build(nnx.Rngs(0))
    batch = batch_at(0)
    ids_BT = np.array([[3, 5, -1], [7, -1, -1], [-1, -1, -1], [1, 2, 3]] * 2, np.int32)
    heard_BQD = model.compress(batch._replace(instruction_BT=ids_BT)).tokens_BQD
    embed = np.asarray(model.llm.embed(np.arange(24)[None])[0])
    np.testing.assert_allclose(heard_BQD[0, 0], (embed[3] + embed[5]) / 2, atol=1e-6)
    np.testing.assert_allclose(heard_BQD[1, 0], embed[7], atol=1e-6)
    np.testing.assert_array_equal(heard_BQD[2], 0)
    with pytest.raises(ValueError, match=r"conditioned on the question and got no context.text_BTD"):
        model.compress(batch)


def test_what_is_random_depends_on_sample_and_step_alone():
    """The same sample draws the same in another batch, another place and another microbatch."""
    seen = []

    class Spy(Heard):
        def __call__(self, tokens_BNC, context):
            seen.append(jax.random.key_data(context.keys_B))
            assert context.progress == 0.5
            return super().__call__(tokens_BNC, context)

    class Spying(Hearing):
        def build(self, widths, rngs):
            return Spy(widths)

    model = dataclasses.replace(VLM, compressor=Spying()).build(nnx.Rngs(0))
    batch = batch_at(0)._replace(instruction_BT=np.ones((8, 2), np.int32))
    key, half = jax.random.key(3), jnp.float32(0.5)
    model.loss_terms(batch, key, half)
    model.loss_terms(jax.tree.map(lambda x: x[::-2], batch), key, half)
    np.testing.assert_array_equal(seen[0][::-2], seen[1])
    assert len(np.unique(seen[0], axis=0)) == 8
