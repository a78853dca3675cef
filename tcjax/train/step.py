"""One training step as a pure function: gradient of the trainable side only -> optax -> new state.

    loss = total / count with both summed over the whole global batch, so 1x8, 2x4 and 8x1 (devices or microbatches) agree

Microbatches are strided (rows a, a + A, ...), so that each keeps every device busy with its own rows; a row's images
go with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tcjax.batch import Batch
from tcjax.loss import Terms
from tcjax.sharding import on, rows_apart, shardings, whole_now
from tcjax.train.state import State, cast


class Metrics(NamedTuple):
    """Of one step, before its update. loss: nats per supervised token; accuracy: of teacher-forced argmax; count: tokens."""

    loss: jax.Array
    accuracy: jax.Array
    count: jax.Array
    grad_norm: jax.Array


def make_step(
    graphdef: Any,
    optimiser: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dtype: Any = jnp.float32,
    seed: int = 0,
    steps: int = 1,
) -> Callable[[State, Any, Batch, Any], tuple[State, Metrics]]:
    """`step(state, frozen, batch, number) -> (state, metrics)`, to be jitted with argument 0 donated.

    What the model draws at random is a pure function of (seed, number of the step, sample): a resumed run draws the same.

    Args:
        accumulate: microbatches per step, each B / accumulate rows.
        dtype: of the forward and backward pass; parameters, moments, loss and gradient sums are float32.
        steps: of the whole training; `number` counts from 1 to it.
    """

    def total(trainable: Any, frozen: Any, batch: Batch, key: Any, progress: Any) -> tuple[jax.Array, Terms]:
        trainable, frozen = (whole_now(cast(tree, dtype)) for tree in (trainable, frozen))
        model = nnx.merge(graphdef, trainable, frozen)
        terms = model.loss_terms(rows_apart(cast(batch, dtype)), key, progress)
        return terms.total, terms

    def step(state: State, frozen: Any, batch: Batch, number: Any) -> tuple[State, Metrics]:
        key, progress = jax.random.fold_in(jax.random.key(seed), number), number / jnp.float32(steps)
        gradient = jax.grad(partial(total, key=key, progress=progress), has_aux=True)
        if accumulate == 1:
            grads, terms = gradient(state.trainable, frozen, batch)
        else:
            grads, terms = _accumulated(gradient, state.trainable, frozen, batch, accumulate)
        count = jnp.maximum(terms.count, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, moments = optimiser.update(grads, state.optimiser, state.trainable)
        metrics = Metrics(terms.total / count, terms.correct / count, terms.count, optax.tree.norm(grads))
        return State(optax.apply_updates(state.trainable, updates), moments), metrics

    return step


def jit_step(step: Callable, state: State, mesh: Mesh) -> Any:
    """The step compiled for these shardings, its state donated. What comes out lies as what went in: one compile."""

    def on_mesh(*args: Any) -> Any:
        with on(mesh):
            return step(*args)

    return jax.jit(
        on_mesh, donate_argnums=0, out_shardings=(shardings(state, mesh), NamedSharding(mesh, PartitionSpec()))
    )


def _accumulated(gradient: Callable, trainable: Any, frozen: Any, batch: Batch, num: int) -> tuple[Any, Terms]:
    rows = len(batch.tokens_BS)

    def strided(leaf: jax.Array) -> jax.Array:
        """Leading axis: microbatches, then of each its rows, or its rows' images."""
        per_row = leaf.shape[0] // rows
        by_row = leaf.reshape(rows // num, num, per_row, *leaf.shape[1:])
        return by_row.swapaxes(0, 1).reshape(num, rows // num * per_row, *leaf.shape[1:])

    micro = jax.tree.map(strided, batch)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(trainable, frozen, part)), None

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(add, (zeros, Terms(*jnp.zeros(3))), micro)[0]
