"""Scaled dot-product attention, the one door through which every room attends.

    y = softmax(q k^T * scale + mask) v          softmax in float32, over the M positions attended to

Grouped queries: K query heads share J key/value heads, head k reads key/value head k // (K / J).
Source: `jax.nn.dot_product_attention` does the arithmetic of `attend`. `attend_causally` writes the two products out:
cut into query blocks that see only their own past, they are the same sums with 3/8 less work and memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_CAUSAL_BLOCKS = 4


def attend(
    query_BSKA: jax.Array,
    key_BMJA: jax.Array,
    value_BMJA: jax.Array,
    *,
    mask_BSM: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of S positions to M positions.

    Args:
        mask_BSM: bool, True where position s may see position m; None sees all. B or S may be 1.
            A row that sees nothing gives an average over everything: give every row one True and mask its output.
        scale: factor on the logits; A**-0.5 if None.

    Returns:
        BSKA in the type of value_BMJA.
    """
    mask = None if mask_BSM is None else mask_BSM[:, None]
    return jax.nn.dot_product_attention(query_BSKA, key_BMJA, value_BMJA, mask=mask, scale=scale)


def padding_mask(valid_BM: jax.Array | None) -> jax.Array | None:
    """mask_BSM (S = 1) that hides padding from everyone; a row without anything valid sees all: mask its output."""
    return None if valid_BM is None else (valid_BM | ~valid_BM.any(-1, keepdims=True))[:, None]


def attend_causally(
    query_BSKA: jax.Array,
    key_BSJA: jax.Array,
    value_BSJA: jax.Array,
    *,
    valid_BS: jax.Array,
    segment_BS: jax.Array | None = None,
) -> jax.Array:
    """Causal self-attention: position s sees the valid positions up to s, and always itself.

    With segment_BS, of those only segment 0 and its own.
    """
    (B, S, K, A), J = query_BSKA.shape, key_BSJA.shape[2]
    scaled_BSKA = query_BSKA * jnp.asarray(A**-0.5, query_BSKA.dtype)
    # Heads before positions, once: every product below is then a plain batched one (a CPU step takes 0.85 of the time).
    query_BJGSA = scaled_BSKA.reshape(B, S, J, K // J, A).transpose(0, 2, 3, 1, 4)
    key_BJMA, value_BJMA = key_BSJA.transpose(0, 2, 1, 3), value_BSJA.transpose(0, 2, 1, 3)
    block = -(-S // _CAUSAL_BLOCKS)
    blocks = []
    for start in range(0, S, block):
        end = min(start + block, S)
        row_S, column_M = jnp.arange(start, end)[:, None], jnp.arange(end)[None, :]
        mask_BSM = (column_M < row_S) & valid_BS[:, None, :end] | (column_M == row_S)
        if segment_BS is not None:
            of_key_BSM = segment_BS[:, None, :end]
            mask_BSM &= (of_key_BSM == 0) | (of_key_BSM == segment_BS[:, start:end, None])
        block_BJGSA, seen_BJMA = query_BJGSA[:, :, :, start:end], key_BJMA[:, :, :end]
        logits_BJGSM = jnp.einsum("BJGSA,BJMA->BJGSM", block_BJGSA, seen_BJMA, preferred_element_type=jnp.float32)
        weights_BJGSM = jax.nn.softmax(jnp.where(mask_BSM[:, None, None], logits_BJGSM, -1e30))
        blocks.append(jnp.einsum("BJGSM,BJMA->BJGSA", weights_BJGSM.astype(value_BJMA.dtype), value_BJMA[:, :, :end]))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, S, K, A)


def attention_weights(
    query_BSKA: jax.Array, key_BMKA: jax.Array, *, mask_BSM: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """The softmax weights BKSM themselves, float32, for pictures of who looks where."""
    factor = query_BSKA.shape[-1] ** -0.5 if scale is None else scale
    logits_BKSM = jnp.einsum("BSKA,BMKA->BKSM", query_BSKA, key_BMKA).astype(jnp.float32) * factor
    if mask_BSM is not None:
        logits_BKSM = jnp.where(mask_BSM[:, None], logits_BKSM, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits_BKSM)
