"""The loss is a mean over the global count: however the batch is cut, the sums are the same."""

import jax.numpy as jnp
import numpy as np
import torch

from tcjax.loss import next_token


def test_the_mean_equals_torch_on_the_supervised_tokens():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7, 11)).astype(np.float32)
    tokens, supervised = rng.integers(0, 11, (3, 7)), rng.random((3, 7)) < 0.4
    terms = next_token(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(supervised))
    labels = np.where(supervised, tokens, -100)[:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits[:, :-1].reshape(-1, 11)), torch.tensor(labels))
    np.testing.assert_allclose(terms.total / terms.count, expected, rtol=1e-6)
    hits = (logits[:, :-1].argmax(-1) == tokens[:, 1:])[supervised[:, 1:]].sum()
    assert terms.correct == hits and terms.count == supervised[:, 1:].sum()


def test_sums_of_thin_and_full_rows_add_up():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 5, (4, 6)))
    supervised = jnp.zeros((4, 6), bool).at[0].set(True).at[1, 2].set(True)
    whole = next_token(logits, tokens, supervised)
    rows = [next_token(logits[i : i + 1], tokens[i : i + 1], supervised[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(sum(r.total for r in rows), whole.total, rtol=1e-6)
    assert sum(r.count for r in rows) == whole.count == 6


def test_an_unsupervised_row_costs_nothing():
    terms = next_token(jnp.ones((1, 3, 4)), jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), bool))
    assert terms.total == 0 and terms.count == 0
