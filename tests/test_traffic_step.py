"""What the trainer's own step sends, read off the partitioned program: FSDP gathers frozen weights twice, and only
gradients of what learns and scalars go between islands."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tcjax.assemble import abstract
from tcjax.batch import Batch
from tcjax.config import LoraConfig, MeshConfig, TrainConfig
from tcjax.plan.traffic import Traffic, traffic
from tcjax.sharding import make_mesh, shardings
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import init, part_of, recompute, split
from tcjax.train.step import jit_step, make_step
from tests.partitioned import partitioned
from tests.tiny import QUERIES, VLM

LAYERS = 10  # so many are scanned
VOCAB = 2048  # a table larger than the rows that are looked up in it, as in real models
CONFIG = dataclasses.replace(
    VLM, llm=dataclasses.replace(VLM.llm, vocab=VOCAB, layers=LAYERS, width=32, heads=4, kv_heads=4, feed_forward=64)
)


class Step(NamedTuple):
    """traffic: of one device. learning: shapes of what learns. frozen: {part: bytes by type}, as it lies in memory."""

    traffic: Traffic
    learning: list[tuple[int, ...]]
    frozen: dict[str, dict[str, int]]

    @property
    def frozen_bytes(self) -> int:
        return sum(sum(by_type.values()) for by_type in self.frozen.values())


def a_step(
    *, data: int, fsdp: int, tensor: int = 1, frozen: str = "bfloat16", remat: str = "full", rows: int = 1
) -> Step:
    """The trainer's step on data x fsdp x tensor devices, one island per data index, `rows` rows per model copy."""
    inside = fsdp * tensor
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * inside])
    model = abstract(CONFIG, trainable=("compressor",), frozen=frozen, lora=LoraConfig())
    recompute(model, remat)
    graphdef, learning, still = split(model, ("compressor",))
    optimiser = make_optimiser(TrainConfig(steps=6))
    state = jax.eval_shape(lambda learning: init(learning, optimiser), learning)
    B, S, apart = rows * data * fsdp, QUERIES + 60, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def placed(tree):
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings(tree, mesh)
        )

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=apart)

    flags = {name: array(jnp.bool_, S) for name in ("is_image_BS", "supervised_BS", "valid_BS")}
    images = array(jnp.uint8, 16, 16, 3)
    batch = Batch(tokens_BS=array(jnp.int32, S), index_B=array(jnp.int32), images_BYX3=images, **flags)
    step = jit_step(make_step(graphdef, optimiser, dtype=jnp.bfloat16, steps=6), state, mesh)
    lowered = step.lower(placed(state), placed(still), batch, jax.ShapeDtypeStruct((), jnp.int32))
    counted = traffic(partitioned(lowered), [device // inside for device in range(data * inside)])
    parts: dict[str, dict[str, int]] = {}
    for where, leaf in jax.tree.leaves_with_path(still):
        of_type = parts.setdefault(part_of(tuple(getattr(key, "key", key) for key in where)), {})
        of_type[leaf.dtype.name] = of_type.get(leaf.dtype.name, 0) + leaf.size * leaf.dtype.itemsize
    return Step(counted, [leaf.shape for leaf in jax.tree.leaves(learning)], parts)


@pytest.fixture(scope="module")
def two_islands():
    return a_step(data=2, fsdp=4)


@pytest.fixture(scope="module")
def quantised():
    pytest.importorskip("qwix")
    return a_step(data=2, fsdp=4, frozen="int8")


def assert_sums_only_what_learns(step: Step) -> None:
    """Each gradient once, over everyone, and otherwise scalars: there is no sum for anything frozen."""
    sums = [c for c in step.traffic.collectives if c.kind in ("all-reduce", "reduce-scatter") and c.shape]
    assert sorted(map(_sizes, (c.shape for c in sums))) == sorted(map(_sizes, step.learning))
    assert {(c.times, c.group) for c in sums} == {(1, 8)}


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """A gradient may be summed transposed, and without the axis of a stack of one layer."""
    return sorted(size for size in shape if size > 1)


def test_frozen_parameters_have_no_gradient_anywhere(two_islands):
    assert_sums_only_what_learns(two_islands)


def test_only_gradients_of_the_compressor_and_scalars_cross_islands(two_islands):
    crossing = [c for c in two_islands.traffic.collectives if c.spans_islands]
    gradients = sum(c.bytes for c in crossing if c.shape)
    scalars = [c for c in crossing if not c.shape]
    assert {c.kind for c in crossing} == {"all-reduce"}
    assert {c.bytes for c in scalars} == {4}
    # of two islands each sends its half of the sum and gets it back: over 4 devices, 2 * 1/2 / 4 of the bytes per device
    assert two_islands.traffic.dcn_bytes == gradients // 4 + sum(c.times for c in scalars)


def test_with_tensor_parallelism_too_nothing_but_sums_crosses_islands():
    """Of a matrix in shares over tensor each device sums its own share."""
    step = a_step(data=2, fsdp=2, tensor=2)
    crossing = [c for c in step.traffic.collectives if c.spans_islands]
    learning = sum(map(math.prod, step.learning))
    assert {c.kind for c in crossing} == {"all-reduce"}
    assert sum(c.bytes * c.times for c in crossing) < 4 * learning


def test_frozen_weights_are_gathered_twice_in_a_step_at_most(two_islands):
    """Forward, and once for recomputation and backward; the tower once. What learns (under 8 kB of bfloat16) is in it."""
    gathered = two_islands.traffic.of("all-gather")
    llm, tower = (two_islands.frozen[part]["bfloat16"] for part in ("llm", "tower"))
    learning = sum(map(math.prod, two_islands.learning))
    table = CONFIG.llm.vocab * CONFIG.llm.width * 2
    assert two_islands.frozen_bytes == llm + tower
    assert gathered <= 2 * two_islands.frozen_bytes + 2 * 2 * learning
    assert gathered >= 2 * (llm - table) + tower


def test_int8_weights_travel_as_codes_in_half_the_bytes(quantised, two_islands):
    codes = {part: by_type.get("int8", 0) for part, by_type in quantised.frozen.items()}
    assert quantised.traffic.of("all-gather", "s8") == 2 * codes["llm"] + codes["tower"]
    matrices = LAYERS * (4 * 32 * 32 + 3 * 32 * 64)
    assert codes["llm"] == matrices
    in_bfloat16 = sum(
        c.bytes * c.times
        for c in two_islands.traffic.collectives
        if c.kind == "all-gather" and c.times == LAYERS and len(c.shape) >= 2 and min(c.shape[-2:]) >= 32
    )
    assert 2 * 2 * codes["llm"] == in_bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "save-attention", "offload"])
def test_other_remat_policies_gather_no_more(two_islands, remat):
    other = a_step(data=2, fsdp=4, remat=remat)
    assert other.traffic.of("all-gather") <= two_islands.traffic.of("all-gather")
    assert other.traffic.dcn_bytes == two_islands.traffic.dcn_bytes
    assert_sums_only_what_learns(other)


@pytest.mark.slow
def test_a_device_sends_what_it_sent_when_there_are_more_of_them():
    """At one row per device: what is handed over stays, of which (n - 1) / n is sent. From 16 to 256 that is 6 % more."""
    handed = {}
    for n in (2, 4, 8):
        step = a_step(data=1, fsdp=n).traffic
        handed[n] = step.of("all-gather")
        sent = sum(c.ici_bytes * c.times for c in step.collectives if c.kind == "all-gather")
        assert sent == pytest.approx(handed[n] * (n - 1) / n, rel=1e-3)
    assert [handed[2], handed[4]] == pytest.approx([handed[8]] * 2, rel=0.01)
    assert (255 / 256) / (15 / 16) < 1.1
