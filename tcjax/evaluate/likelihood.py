"""How likely is each of some answers after an image and a question: sums of log-probabilities, without generating.

    log p(choice | prompt) = sum over its tokens of log p(token | prompt, tokens before it)

The prompt, visual tokens included, is read once per image; every choice then continues from its cache, some at a time.
Cost per image: one prefill and 2 (parameters of the LLM) FLOPs per token of all choices together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.batch import Batch
from tcjax.evaluate.generate import prefill
from tcjax.sharding import jit_where_it_lies
from tcjax.vlm import Vlm

TOGETHER = 64  # rows of the cache that are extended at once: prompts x choices


class Likelihood(NamedTuple):
    """Per prompt and choice, float32 [B, choices]. greedy: bool, whether generating greedily would say just this."""

    total: np.ndarray
    greedy: np.ndarray


def make_likelihood(model: Vlm) -> Callable[[Batch, Sequence[Sequence[int]]], Likelihood]:
    """`likelihood(prompts, choices)`, jitted; choices are ids without an end mark, prompts are padded on the left."""
    graphdef, state = nnx.split(model)

    def run(
        state: Any, batch: Batch, choices: jax.Array, valid: jax.Array, together: int
    ) -> tuple[jax.Array, jax.Array]:
        return _likelihood(nnx.merge(graphdef, state), batch, choices, valid, together)

    jitted = jit_where_it_lies(run, state, static_argnames="together")

    def likelihood(batch: Batch, choices: Sequence[Sequence[int]]) -> Likelihood:
        if not choices or not all(len(choice) for choice in choices):
            raise ValueError(f"every choice needs at least one token, and there must be one; got {list(choices)[:5]}.")
        together = max(1, min(len(choices), TOGETHER // len(batch.tokens_BS)))
        rows = -(-len(choices) // together) * together
        length = max(map(len, choices))
        ids, valid = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for row, choice in enumerate(choices):
            ids[row, : len(choice)], valid[row, : len(choice)] = choice, True
        total, greedy = jitted(state, batch, ids, valid, together=together)
        return Likelihood(np.asarray(total)[:, : len(choices)], np.asarray(greedy)[:, : len(choices)])

    return likelihood


def _likelihood(
    model: Vlm, batch: Batch, choices: jax.Array, valid: jax.Array, together: int
) -> tuple[jax.Array, jax.Array]:
    """choices, valid: [choices, T], right-padded; their number is a multiple of `together`."""
    B, (_, T) = len(batch.tokens_BS), choices.shape
    first_BV, cache = prefill(model, batch, room=max(T - 1, 1))
    # Every row of the cache once per choice of a chunk: prompt b's choices are rows b * together and on.
    cache = cache._replace(
        key_LBMJA=jnp.repeat(cache.key_LBMJA, together, axis=1),
        value_LBMJA=jnp.repeat(cache.value_LBMJA, together, axis=1),
        valid_BM=jnp.repeat(cache.valid_BM, together, axis=0),
    )
    first_BV = jnp.repeat(first_BV, together, axis=0)

    def some(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ids_BT, valid_BT = (jnp.tile(part, (B, 1)) for part in chunk)
        logits_BTV = first_BV[:, None]
        if T > 1:  # what follows a choice's padding is never read, and padding never precedes a token of it
            hidden_BTD, _ = model.llm.extend(model.llm.embed(ids_BT[:, :-1]), cache)
            logits_BTV = jnp.concatenate([logits_BTV, model.llm.logits(hidden_BTD)], axis=1)
        logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        logp_BT = jnp.take_along_axis(logp_BTV, ids_BT[..., None], axis=-1)[..., 0]
        likely_BT = logits_BTV.argmax(-1) == ids_BT
        total, greedy = jnp.where(valid_BT, logp_BT, 0).sum(1), jnp.where(valid_BT, likely_BT, True).all(1)
        return total.reshape(B, together), greedy.reshape(B, together)

    chunks = (choices.reshape(-1, together, T), valid.reshape(-1, together, T))
    total, greedy = jax.lax.map(some, chunks)  # [chunks, B, together]
    return total.swapaxes(0, 1).reshape(B, -1), greedy.swapaxes(0, 1).reshape(B, -1)
