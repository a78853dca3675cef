"""A stack of L equal blocks as one block whose parameters carry a leading L axis, run by `lax.scan`.

Compile time and program size do not grow with depth, and a checkpoint's per-layer names map to one leaf (interop). Under
fsdp a layer's weights are gathered inside the loop, when it is their turn (tcjax.nn.dense), and again in the backward pass.

What the backward pass finds of a layer, by `remat`:
    none             all of it
    full             what came in; the layer is computed again (Chen et al. 2016)
    save-attention   what came in and what attention gave (`checkpoint_name` "attention", or all that cuDNN keeps):
                     attention is not computed again
    offload          what came in, in the host's memory; the layer is computed again
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tcjax.sharding import rows_apart, whole_vectors

REMATS = ("none", "full", "save-attention", "offload")
ATTENTION, INPUT = "attention", "layer input"  # names of what a policy may keep
CUDNN = "dot_product_attention_fwd_wrapper"  # a primitive: what it keeps for the backward pass has no name
_UNROLLED = 8  # so few layers run without a loop: a training step saves the copies in and out of it (1/5 on a CPU)


def stack(make: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num` blocks with independent initial weights; every parameter's `axes` gains a leading "L"."""
    made = [make(rngs) for _ in range(num)]
    graphdef, _ = nnx.split(made[0])
    states = [nnx.state(block) for block in made]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    block = nnx.merge(graphdef, stacked)
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(axes="L" + variable.get_metadata("axes"))
    return block


def run(
    blocks: nnx.Module,
    step: Callable,
    carry,
    *,
    inputs=None,
    start: int = 0,
    num: int | None = None,
    remat: str = "none",
):
    """`carry, outputs = step(block, carry, input)` through `num` layers from layer `start` on (all others if None).

    Args:
        carry: arrays that lead with B.
        remat: one of `REMATS`.

    Returns:
        The last carry and the outputs stacked on a leading L axis, as `lax.scan` does.
    """
    graphdef, state = nnx.split(blocks)
    if start or num is not None:
        state = jax.tree.map(lambda leaf_L: leaf_L[start : None if num is None else start + num], state)

    def body(carry, layer):
        block_state, layer_input = layer
        carry = rows_apart(carry)
        if remat == "offload":
            carry = checkpoint_name(carry, INPUT)
        block = nnx.merge(graphdef, whole_vectors(block_state))
        return step(block, carry, layer_input)

    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=_policy(remat))
    depth = len(jax.tree.leaves(state)[0])
    return jax.lax.scan(body, carry, (state, inputs), unroll=depth <= _UNROLLED)


def _policy(remat: str) -> Callable:
    policies = jax.checkpoint_policies
    if remat == "save-attention":
        named = policies.save_only_these_names(ATTENTION)
        return lambda primitive, *avals, **params: primitive.name == CUDNN or named(primitive, *avals, **params)
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.nothing_saveable
