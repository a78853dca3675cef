"""One token at a time, as soon as it is known: a prefill and a step, each compiled once per shape of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.batch import Batch
from tcjax.evaluate.generate import prefill
from tcjax.vlm import Vlm


def make_stream(model: Vlm, *, end: int) -> Callable[[Batch, int], Iterator[int]]:
    """`stream(prompt, steps)` yields the greedy ids of a batch of one, up to the end mark, which is not yielded."""
    graphdef, state = nnx.split(model)

    @partial(jax.jit, static_argnames="room")
    def begin(state: Any, batch: Batch, room: int) -> tuple[jax.Array, Any]:
        logits_BV, cache = prefill(nnx.merge(graphdef, state), batch, room=room)
        return logits_BV.argmax(-1).astype(jnp.int32), cache

    @partial(jax.jit, donate_argnums=2)
    def go_on(state: Any, last_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        llm = nnx.merge(graphdef, state).llm
        hidden_BSD, cache = llm.extend(llm.embed(last_B[:, None]), cache)
        return llm.logits(hidden_BSD)[:, 0].argmax(-1).astype(jnp.int32), cache

    def stream(batch: Batch, steps: int) -> Iterator[int]:
        last_B, cache = begin(state, batch, steps)
        for step in range(steps):
            if int(last_B[0]) == end:
                return
            yield int(last_B[0])
            if step + 1 < steps:
                last_B, cache = go_on(state, last_B, cache)

    return stream
