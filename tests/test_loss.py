"""The loss is a mean over the global count: however the batch is cut, the sums are the same. No logits where nothing is asked."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from tcjax import loss
from tcjax.config import MeshConfig
from tcjax.loss import cross_entropy, next_token
from tcjax.sharding import make_mesh, on, spec, whole


def made(rows: int, length: int, width: int, vocabulary: int, share: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden_BSD = rng.normal(size=(rows, length, width)).astype(np.float32)
    table_VD = rng.normal(size=(vocabulary, width)).astype(np.float32)
    tokens_BS = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    return hidden_BSD, table_VD, tokens_BS, rng.random((rows, length)) < share


def test_the_mean_equals_torch_on_the_supervised_tokens():
    hidden, table, tokens, supervised = made(3, 7, 5, 11, 0.4)
    terms = next_token(*map(jnp.asarray, (hidden, table, tokens, supervised)))
    logits = hidden @ table.T
    labels = np.where(supervised, tokens, -100)[:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:, :-1].reshape(-1, 11)), torch.tensor(labels).long()
    )
    np.testing.assert_allclose(terms.total / terms.count, expected, rtol=1e-6)
    hits = (logits[:, :-1].argmax(-1) == tokens[:, 1:])[supervised[:, 1:]].sum()
    assert terms.correct == hits and terms.count == supervised[:, 1:].sum()


@pytest.mark.parametrize("positions", [1, 4, 64])
@pytest.mark.parametrize("learns", ["hidden", "table", "both"])
def test_gradients_equal_those_of_whole_logits(monkeypatch, positions, learns):
    monkeypatch.setattr(loss, "_POSITIONS", positions)
    hidden, table, tokens, supervised = map(jnp.asarray, made(3, 10, 6, 9, 0.5))
    wanted = {"hidden": (0,), "table": (1,), "both": (0, 1)}[learns]

    def plain(hidden, table):
        logits = jnp.einsum("BSD,VD->BSV", hidden, table)
        return 2.5 * cross_entropy(logits[:, :-1], tokens[:, 1:], supervised[:, 1:]).total

    def ours(hidden, table):
        return 2.5 * next_token(hidden, table, tokens, supervised).total

    expected = jax.jit(jax.value_and_grad(plain, wanted))(hidden, table)
    got = jax.jit(jax.value_and_grad(ours, wanted))(hidden, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), got, expected)


def test_only_supervised_positions_meet_the_vocabulary(monkeypatch):
    """A hidden state that is infinite where nothing is asked spoils nothing: it is never multiplied."""
    monkeypatch.setattr(loss, "_POSITIONS", 2)
    hidden, table, tokens, _ = made(2, 8, 4, 7, 0)
    supervised = np.zeros((2, 8), bool)
    supervised[0, 3:5], supervised[1, 6] = True, True
    clean = next_token(*map(jnp.asarray, (hidden, table, tokens, supervised)))
    hidden[0, 4:], hidden[0, :2] = np.inf, np.inf
    assert next_token(*map(jnp.asarray, (hidden, table, tokens, supervised))) == clean


def test_bfloat16_gradients_are_those_of_float32_rounded():
    hidden, table, tokens, supervised = map(jnp.asarray, made(2, 12, 8, 30, 0.6))
    half = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    grad = jax.grad(lambda hidden, table: next_token(hidden, table, tokens, supervised).total)
    expected = grad(*(x.astype(jnp.float32) for x in half))
    got = grad(*half)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=2e-2 * float(jnp.abs(expected).max()))


def test_sums_of_thin_and_full_rows_add_up():
    hidden, table, tokens, _ = map(jnp.asarray, made(4, 6, 3, 5, 0, seed=1))
    supervised = jnp.zeros((4, 6), bool).at[0].set(True).at[1, 2].set(True)
    whole = next_token(hidden, table, tokens, supervised)
    rows = [next_token(hidden[i : i + 1], table, tokens[i : i + 1], supervised[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(sum(r.total for r in rows), whole.total, rtol=1e-6)
    assert sum(r.count for r in rows) == whole.count == 6


def test_an_unsupervised_row_costs_nothing():
    terms = next_token(jnp.ones((1, 3, 2)), jnp.ones((4, 2)), jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), bool))
    assert terms.total == 0 and terms.count == 0


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_rows_meet_after_the_walk_only(mesh):
    """The table is gathered once before it, and gradients are summed once after it, however long the walk is."""
    mesh = make_mesh(MeshConfig(**{"data": 1, "tensor": 1} | mesh))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    hidden_BSD = jax.ShapeDtypeStruct((8, 100, 16), jnp.float32, sharding=rows)
    share = NamedSharding(mesh, spec("VD", (64, 16), mesh))
    table_VD = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=share)
    tokens_BS, supervised_BS = (jax.ShapeDtypeStruct((8, 100), dtype, sharding=rows) for dtype in (jnp.int32, bool))

    def total(hidden_BSD, table_VD, tokens_BS, supervised_BS):
        with on(mesh):
            return next_token(hidden_BSD, whole(table_VD, "VD"), tokens_BS, supervised_BS).total

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(hidden_BSD, table_VD, tokens_BS, supervised_BS).compile()
    before, entry = str(compiled.as_text()).split("\nENTRY ")
    assert " while(" in entry
    assert "all-gather" in entry and "all-reduce" in entry
    assert not re.search(r" (all-|reduce-scatter|collective-permute)", before)
