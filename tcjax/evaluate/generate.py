"""Greedy answers: one jitted prefill over [image, question], then one token at a time from the KV cache.

Prompts of a batch are padded on the left, so that all rows write the same cache slot; positions count valid tokens only.
A shape compiles once. Generation of a batch ends when every row has said its end mark, or after `steps` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.batch import Batch
from tcjax.sharding import replicated
from tcjax.vlm import Vlm


def prefill(model: Vlm, batch: Batch, *, room: int) -> tuple[jax.Array, Any]:
    """Logits after the prompt, [B, V] float32, and the cache with `room` free slots."""
    seq_BSD, valid_BS = model.embed(batch)
    hidden_BSD, cache = model.llm.prefill(seq_BSD, valid_BS, room)
    return model.llm.logits(hidden_BSD[:, -1:])[:, 0], cache


def generate(model: Vlm, batch: Batch, *, steps: int, end: int | Sequence[int]) -> jax.Array:
    """The argmax continuation of each prompt, int32 [B, steps].

    Args:
        end: ids that finish a row, one or any of several; none: every row says `steps` tokens. A finished row repeats its
            last id.
    """
    ends = jnp.array([end] if isinstance(end, int) else list(end), jnp.int32)

    def finished(last_B: jax.Array) -> jax.Array:
        return (last_B[:, None] == ends).any(-1)

    logits_BV, cache = prefill(model, batch, room=steps)
    first_B = logits_BV.argmax(-1).astype(jnp.int32)
    said = jnp.broadcast_to(first_B[:, None], (first_B.shape[0], steps))

    def unfinished(loop: tuple) -> jax.Array:
        step, _, last_B, _ = loop
        return (step < steps) & ~finished(last_B).all()

    def extend(loop: tuple) -> tuple:
        step, said, last_B, cache = loop
        hidden_BSD, cache = model.llm.extend(model.llm.embed(last_B[:, None]), cache)
        next_B = model.llm.logits(hidden_BSD)[:, 0].argmax(-1).astype(jnp.int32)
        next_B = jnp.where(finished(last_B), last_B, next_B)
        # What follows is filled too: it stays where all rows have finished.
        said = jnp.where(jnp.arange(steps) >= step, next_B[:, None], said)
        return step + 1, said, next_B, cache

    return jax.lax.while_loop(unfinished, extend, (jnp.int32(1), said, first_B, cache))[1]


def make_generate(model: Vlm, *, end: int | Sequence[int]) -> Callable[[Batch, int], jax.Array]:
    """`answer(batch, steps) -> ids [B, steps]`, jitted; compiled once per shape and number of steps."""
    graphdef, state = nnx.split(model)

    @partial(jax.jit, static_argnames="steps", out_shardings=replicated(state))
    def run(state: Any, batch: Batch, steps: int) -> jax.Array:
        return generate(nnx.merge(graphdef, state), batch, steps=steps, end=end)

    return lambda batch, steps: run(state, batch, steps=steps)


def make_prefill(model: Vlm) -> Callable[[Batch], jax.Array]:
    """`logits = prefill(batch)`, jitted: what the first token waits for."""
    graphdef, state = nnx.split(model)
    run = jax.jit(
        lambda state, batch: prefill(nnx.merge(graphdef, state), batch, room=0)[0], out_shardings=replicated(state)
    )
    return lambda batch: run(state, batch)
