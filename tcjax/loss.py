"""Cross-entropy as a sum and a count, so that the mean is over the *global* number of supervised tokens.

    loss = sum over devices and microbatches of total / sum of count

A mean of means would weigh a short answer in a thin shard more than one in a full shard; this is equal for 1x8, 2x4, 8x1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


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


def next_token(logits_BSV: jax.Array, tokens_BS: jax.Array, supervised_BS: jax.Array) -> Terms:
    """Position s predicts token s + 1; a token counts where it is supervised."""
    return cross_entropy(logits_BSV[:, :-1], tokens_BS[:, 1:], supervised_BS[:, 1:])
