"""What a step executes: the trainer's own step, counted on its jaxpr, against formulas and against XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tcjax.batch import Batch
from tcjax.compressors import avg_pool
from tcjax.config import TrainConfig
from tcjax.evaluate.cost import llm_flops, training_flops
from tcjax.evaluate.flops import matmul_bytes, matmul_flops
from tcjax.loss import next_token
from tcjax.plan.predict import EFFICIENCY, Prediction, predict
from tcjax.plan.traffic import Traffic
from tcjax.plan.work import executed_flops, hbm_bytes
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import init, recompute, split
from tcjax.train.step import make_step
from tests.tiny import LLM, QUERIES, VLM

CONFIG = dataclasses.replace(VLM, compressor=avg_pool.Config(num_queries=QUERIES))  # one matrix: 16 x 16
ROWS, S = 4, 33  # 32 positions predict one: a turn of the loss


def a_step(config=CONFIG, *, rows=ROWS, positions=S, accumulate=1, remat="none", trainable=("compressor",)):
    """(step, abstract state, frozen, batch and number): the trainer's own step."""
    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    recompute(model, remat)
    graphdef, learning, frozen = split(model, trainable)
    optimiser = make_optimiser(TrainConfig(steps=6))
    state = jax.eval_shape(lambda learning: init(learning, optimiser), learning)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    batch = Batch(
        tokens_BS=array(jnp.int32, positions),
        is_image_BS=array(jnp.bool_, positions),
        supervised_BS=array(jnp.bool_, positions),
        valid_BS=array(jnp.bool_, positions),
        index_B=array(jnp.int32),
        images_BYX3=array(jnp.float32, 16, 16, 3),
    )
    step = make_step(graphdef, optimiser, accumulate=accumulate, steps=6)
    return step, (state, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))


def attention(positions=S) -> int:
    """FLOPs of one row's attention forward, masked blocks skipped."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LLM.build(nnx.Rngs(0))))
    seq = jax.ShapeDtypeStruct((1, positions, LLM.width), jnp.float32)
    forward = matmul_flops(lambda state, seq: nnx.merge(graphdef, state)(seq), state, seq)
    return forward - llm_flops(LLM, positions).weights


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("trainable", [("compressor",), ("compressor", "llm")])
def test_without_remat_the_step_executes_the_useful_flops(trainable, accumulate):
    """But for the masked pairs that attention skips and the gradient for the input of what learns first."""
    step, args = a_step(trainable=trainable, accumulate=accumulate)
    useful = training_flops(CONFIG, S - QUERIES, trainable, supervised=S - 1)
    skipped, unasked = 3 * (llm_flops(LLM, S).attention - attention()), 2 * QUERIES * 16 * 16
    assert executed_flops(step, *args) == ROWS * (useful - skipped - unasked)


def test_remat_makes_four_of_a_frozen_block_six_but_for_its_last_matrix():
    """Computed again is the block's forward pass, not the down projection, whose result nobody asks for."""
    once, again = (executed_flops(*_flat(a_step(remat=remat))) for remat in ("none", "full"))
    down = 2 * LLM.layers * S * LLM.feed_forward * LLM.width
    assert again - once == ROWS * (llm_flops(LLM, S).weights + attention() - down)


def _flat(made):
    step, args = made
    return step, *args


@pytest.mark.parametrize(("positions", "turns"), [(17, 1), (33, 1), (34, 2), (65, 2), (97, 3)])
def test_the_loss_counts_at_its_longest(positions, turns):
    """S - 1 positions predict, 32 at a time: logits once, their gradient once."""
    hidden = jax.ShapeDtypeStruct((2, positions, 8), jnp.float32)
    table, ids = jax.ShapeDtypeStruct((50, 8), jnp.float32), jax.ShapeDtypeStruct((2, positions), jnp.int32)

    def gradient(hidden, table, ids):
        return jax.grad(lambda hidden: next_token(hidden, table, ids, ids > 0).total)(hidden)

    width = min(32, positions - 1)
    assert executed_flops(gradient, hidden, table, ids) == turns * 2 * (2 * 2 * width * 8 * 50)
    with pytest.raises(ValueError, match="while loop multiplies"):
        matmul_flops(gradient, hidden, table, ids)


def test_a_loop_that_slices_nothing_stays_refused():
    square = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="while loop multiplies"):
        executed_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), square)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_count_is_that_of_xla_on_the_unrolled_step(remat):
    """XLA adds one per element of every sum, product, comparison, reduction and random bit: here 0.5 %."""
    wide = dataclasses.replace(
        LLM, width=512, heads=8, kv_heads=8, head_width=64, feed_forward=2048, vocab=512, layers=3
    )
    step, args = a_step(dataclasses.replace(CONFIG, llm=wide), rows=2, remat=remat)
    counted = executed_flops(step, *args)
    of_xla = jax.jit(step).lower(*args).cost_analysis()["flops"]
    assert counted < of_xla < 1.006 * counted


def test_matmul_bytes_are_operands_and_results():
    a, b = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16), jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)

    def thrice(a, b):
        return jax.lax.scan(lambda a, b: (a @ b.astype(a.dtype), None), a, b)[0]

    assert matmul_bytes(thrice, a, b) == 3 * 2 * (4 * 8 + 8 * 8 + 4 * 8)
    assert hbm_bytes(thrice, a, b, gathered=100, state=7) == 3 * 256 + 100 + 14


def test_memory_traffic_of_a_step_grows_with_rows_and_reads_weights_once_per_pass():
    one, two, three = (hbm_bytes(*_flat(a_step(rows=rows))) for rows in (1, 2, 3))
    assert two - one == three - two, "activations grow with the rows"
    again = hbm_bytes(*_flat(a_step(rows=1, remat="full")))
    block = 16 * (16 + 8 + 8 + 16) + 2 * 16 * 32  # all but the last matrix
    assert again - one > 4 * LLM.layers * block


CHIP = type("Chip", (), {"flops": 100.0, "hbm_rate": 10.0, "ici_rate": 4.0, "dcn_rate": 1.0})()


@pytest.mark.parametrize(
    ("work", "moved", "ici", "dcn", "bound", "seconds"),
    [
        (50, 9, 3, 0, "compute", 1.0),
        (50, 11, 3, 0, "HBM", 1.1),
        (50, 9, 8, 0, "ICI", 2.0),
        (50, 9, 8, 3, "DCN", 3.0),
    ],
)
def test_a_step_takes_as_long_as_its_longest_part(work, moved, ici, dcn, bound, seconds):
    prediction = predict(work, moved, Traffic(ici, dcn, ()), CHIP)
    assert (prediction.bound, prediction.step_seconds) == (bound, pytest.approx(seconds))
    assert prediction == pytest.approx(Prediction(work / 100 / EFFICIENCY, moved / 10, ici / 4, dcn))


def test_predictions_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"efficiency=1.5 is a fraction"):
        predict(1, 1, Traffic(0, 0, ()), CHIP, efficiency=1.5)
    alone = type("Chip", (), {"flops": 1.0, "hbm_rate": 1.0, "ici_rate": 0.0, "dcn_rate": 0.0})()
    assert predict(1, 1, Traffic(0, 0, ()), alone).dcn_seconds == 0
    with pytest.raises(ValueError, match="8 bytes over a network that this chip does not have: ici_rate"):
        predict(1, 1, Traffic(8, 0, ()), alone)
