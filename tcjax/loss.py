"""Cross-entropy as a sum and a count, so that the mean is over the *global* number of supervised tokens.

    loss = sum over devices and microbatches of total / sum of count

A mean of means would weigh a short answer in a thin shard more than one in a full shard; this is equal for 1x8, 2x4, 8x1.

Most positions of a multimodal sequence (the image, the question, padding) predict nothing. `next_token` multiplies with
the vocabulary only where something is supervised, some positions at a time, and takes the gradient on the way: logits
[B, S, V] are never there, and nothing is computed twice. The idea is that of Liger's fused linear cross-entropy (Hsu et
al. 2024); our departure is that unsupervised positions are moved behind and left out.

On a mesh every device scores its own rows against its own share of the vocabulary, which was gathered before the walk
(`tcjax.sharding.whole`). Sums over rows stay apart, one per row or device, until the walk is over: inside it nothing goes
between devices but what tensor asks for.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from tcjax.sharding import constrain, row_shares

_POSITIONS = 32  # of a row that meet the vocabulary at a time


class Terms(NamedTuple):
    """total: summed negative log-likelihood in nats; count: supervised tokens; correct: of them, predicted by argmax."""

    total: jax.Array
    count: jax.Array
    correct: jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array, counts: jax.Array) -> Terms:
    """Terms of float32 logits [..., V] against integer targets [...] where counts [...] is True."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probability, targets[..., None], axis=-1)[..., 0]
    weight = counts.astype(jnp.float32)
    correct = (logits.argmax(-1) == targets) * weight
    return Terms(-(picked * weight).sum(), weight.sum(), correct.sum())


def next_token(hidden_BSD: jax.Array, table_VD: jax.Array, tokens_BS: jax.Array, supervised_BS: jax.Array) -> Terms:
    """Position s predicts token s + 1 by hidden_BSD @ table_VD.T; a token counts where it is supervised.

    Differentiable by hidden_BSD and, where it learns, by table_VD.
    """
    counts_BS, targets_BS = supervised_BS[:, 1:], tokens_BS[:, 1:]
    order_BS = jnp.argsort(~counts_BS, axis=1, stable=True)  # what counts comes first
    hidden_BSD = jnp.take_along_axis(hidden_BSD[:, :-1], order_BS[..., None], axis=1)
    targets_BS = jnp.take_along_axis(targets_BS, order_BS, axis=1)
    weight_BS = jnp.take_along_axis(counts_BS, order_BS, axis=1).astype(jnp.float32)
    total, correct = _scored(hidden_BSD, table_VD, targets_BS, weight_BS)
    return Terms(total, weight_BS.sum(), correct)


@jax.custom_vjp
def _scored(
    hidden_BSD: jax.Array, table_VD: jax.Array, targets_BS: jax.Array, weight_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """total and correct; what counts lies in front."""
    return _walk(hidden_BSD, table_VD, targets_BS, weight_BS, by_hidden=False, by_table=False)[0]


def _walk(hidden_BSD, table_VD, targets_BS, weight_BS, *, by_hidden: bool, by_table: bool):
    """((total, correct), gradient by hidden_BSD or None, by table_VD or None), `_POSITIONS` at a time."""
    B, S, _ = hidden_BSD.shape
    width, shares = min(_POSITIONS, S), row_shares(B)
    behind = -S % width
    hidden_BSD, targets_BS, weight_BS = (
        jnp.pad(x, ((0, 0), (0, behind), *((0, 0),) * (x.ndim - 2))) for x in (hidden_BSD, targets_BS, weight_BS)
    )
    used = (weight_BS > 0).sum(1).max()
    sums = (constrain(jnp.zeros(B, jnp.float32), "B"),) * 2
    by_hidden_BSD = jnp.zeros_like(hidden_BSD) if by_hidden else None
    # A device's own rows are one entry of the leading axis.
    by_table_BVD = constrain(jnp.zeros((shares, *table_VD.shape), jnp.float32), "BVD") if by_table else None

    def some(turn, carry):
        (total_B, correct_B), by_hidden_BSD, by_table_BVD = carry
        start = turn * width
        x_BSD, target_BS, w_BS = (
            jax.lax.dynamic_slice_in_dim(x, start, width, axis=1) for x in (hidden_BSD, targets_BS, weight_BS)
        )
        logits_BSV = jnp.einsum("BSD,VD->BSV", x_BSD, table_VD, preferred_element_type=jnp.float32)
        right_BSV = jnp.arange(table_VD.shape[0]) == target_BS[..., None]
        log_sum_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
        picked_BS = jnp.where(right_BSV, logits_BSV, 0).sum(-1)
        total_B += ((log_sum_BS - picked_BS) * w_BS).sum(1)
        correct_B += ((logits_BSV.argmax(-1) == target_BS) * w_BS).sum(1)
        if by_hidden or by_table:
            error_BSV = (jnp.exp(logits_BSV - log_sum_BS[..., None]) - right_BSV) * w_BS[..., None]
            error_BSV = error_BSV.astype(x_BSD.dtype)
        if by_hidden:
            step_BSD = jnp.einsum("BSV,VD->BSD", error_BSV, table_VD)
            by_hidden_BSD = jax.lax.dynamic_update_slice_in_dim(by_hidden_BSD, step_BSD, start, axis=1)
        if by_table:
            error_BIV, x_BID = (x.reshape(shares, -1, x.shape[-1]) for x in (error_BSV, x_BSD))
            by_table_BVD += jnp.einsum("BIV,BID->BVD", error_BIV, x_BID, preferred_element_type=jnp.float32)
        return (total_B, correct_B), by_hidden_BSD, by_table_BVD

    turns = (used + width - 1) // width
    (sums, by_hidden_BSD, by_table_BVD) = jax.lax.fori_loop(0, turns, some, (sums, by_hidden_BSD, by_table_BVD))
    by_table_VD = None if by_table_BVD is None else by_table_BVD.sum(0)
    return (sums[0].sum(), sums[1].sum()), None if by_hidden_BSD is None else by_hidden_BSD[:, :S], by_table_VD


def _forward(hidden_BSD, table_VD, targets_BS, weight_BS):
    values = [argument.value for argument in (hidden_BSD, table_VD, targets_BS, weight_BS)]
    sums, *gradients = _walk(*values, by_hidden=hidden_BSD.perturbed, by_table=table_VD.perturbed)
    like = tuple(jnp.zeros((), value.dtype) for value in values[:2])
    return sums, (*gradients, like)


def _backward(kept, cotangents):
    by_hidden_BSD, by_table_VD, (hidden, table) = kept
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        scale = jnp.float32(0)
    by_hidden_BSD = None if by_hidden_BSD is None else (by_hidden_BSD * scale).astype(hidden.dtype)
    by_table_VD = None if by_table_VD is None else (by_table_VD * scale).astype(table.dtype)
    return by_hidden_BSD, by_table_VD, None, None


_scored.defvjp(_forward, _backward, symbolic_zeros=True)
