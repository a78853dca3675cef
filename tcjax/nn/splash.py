"""Splash attention: the Pallas kernel of `jax.experimental` for TPUs, which never writes the S x M logits to memory.

    y = softmax(q k^T * scale) v over the positions with the same id, and, if causal, not behind

A padding position has an id of its own, so that no other sees it and its own row still sees something. Positions are
padded to whole blocks with an id nobody has; head widths are taken as they are. The kernel runs on every device for its
own rows and heads (`tcjax.nn.attention` says which those are). Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

_NOBODY = -1  # the id of what fills the last block
_BLOCKS = range(1024, 128, -128)  # positions of a tile; the largest first, which keeps the matrix unit busy


def block(positions: int) -> int:
    """The block that fills up `positions` least, the largest of several: 576 -> 640, 704 -> 768, 1600 -> 896, 2048 -> 1024."""
    return min(_BLOCKS, key=lambda size: -positions % size)


def pays(S: int, M: int) -> bool:
    """Whether tiles beat plain products, whose logits the compiler keeps on the chip while they are small: from 256
    positions on either side, unless filling the last block makes more than 1.6 times the logits (257 -> 384)."""
    filled = (S + -S % block(S)) * (M + -M % block(M))
    return min(S, M) >= 256 and filled <= 1.6 * S * M


def attend(
    query_BSKA: jax.Array,
    key_BMJA: jax.Array,
    value_BMJA: jax.Array,
    id_BS: jax.Array,
    id_BM: jax.Array,
    *,
    causal: bool,
    save_as: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """BSKA in the type of value_BMJA; the query is already scaled.

    Args:
        id_BS, id_BM: int32, not negative; position s sees position m if their ids are equal.
        causal: and, with S = M, only if m is not behind s.
        save_as: the name by which a policy of `jax.checkpoint` may keep what the backward pass needs.
        interpret: run the kernel as plain JAX, on any device; for tests.
    """
    S, M = query_BSKA.shape[1], key_BMJA.shape[1]
    of_S, of_M = block(S), block(M)
    query_BKSA, key_BJMA, value_BJMA = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for x, size in ((query_BSKA, of_S), (key_BMJA, of_M), (value_BMJA, of_M))
    )
    id_BS, id_BM = (
        jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), constant_values=_NOBODY)
        for ids, size in ((id_BS, of_S), (id_BM, of_M))
    )
    kernel = _kernel(query_BKSA.shape[1:3], key_BJMA.shape[2], of_S, of_M, causal, save_as, interpret)
    read_BKSA = jax.vmap(kernel)(query_BKSA, key_BJMA, value_BJMA, SegmentIds(id_BS, id_BM))
    assert isinstance(read_BKSA, jax.Array)  # no residuals were asked for
    return read_BKSA[:, :, :S].transpose(0, 2, 1, 3).astype(value_BMJA.dtype)


def _kernel(heads_positions, M: int, of_S: int, of_M: int, causal: bool, save_as: str | None, interpret: bool):
    """One row's kernel. With a single block of keys one backward kernel does both gradients; its sum has one term."""
    K, S = heads_positions
    mask = CausalMask((S, M)) if causal else FullMask((S, M))
    together = of_M == M
    sizes = BlockSizes(
        block_q=of_S,
        block_kv=of_M,
        block_q_dkv=of_S,
        block_kv_dkv=of_M,
        block_q_dq=None if together else of_S,
        block_kv_dq=None if together else of_M,
        use_fused_bwd_kernel=together,
    )
    make = partial(make_splash_mha, head_shards=1, q_seq_shards=1, residual_checkpoint_name=save_as)
    return make(mask=MultiHeadMask([mask] * K), block_sizes=sizes, interpret=interpret)
