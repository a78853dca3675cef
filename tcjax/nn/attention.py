"""Scaled dot-product attention, the one door through which every room attends.

    y = softmax(q k^T * scale + mask) v          softmax in float32, over the M positions attended to

Grouped queries: K query heads share J key/value heads, head k reads key/value head k // (K / J).

Who computes it is decided by the machine that the step is compiled for, owned or not: the mesh of `tcjax.sharding.on`.

    TPU              splash.py, where the mask is one of causal, padding and separate segments, and S and M are long enough
    GPU              cudnn.py, in bfloat16 and float16
    else, no mesh    plainly, here

All agree where a position is valid; what comes out of padding is finite and nobody's. A window or a segment that others
share is a mask that splash would have to be given in full, so on a TPU those are plain, too.

The plain products are written out with the heads before the positions, so that every one is a batched one: on a CPU the
sums of `jax.nn.dot_product_attention` take half as long again. `attend_causally` is cut into query blocks that see only
their own past: the same sums with 3/8 less work and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tcjax.nn import cudnn, splash
from tcjax.nn.layers import ATTENTION
from tcjax.sharding import spec

_CAUSAL_BLOCKS = 4
_HIDDEN = -1e30  # a logit that counts for nothing; finite, so that a row of them has a derivative


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
    (B, S, _, A), M, on = query_BSKA.shape, key_BMJA.shape[1], _target()
    scaled_BSKA = query_BSKA * jnp.asarray(A**-0.5 if scale is None else scale, query_BSKA.dtype)
    heads = (scaled_BSKA, key_BMJA, value_BMJA)
    if on == "tpu" and splash.pays(S, M) and (mask_BSM is None or mask_BSM.shape[1] == 1):
        seen_BM = jnp.ones((B, M), bool) if mask_BSM is None else jnp.broadcast_to(mask_BSM[:, 0], (B, M))
        ids = (jnp.ones((B, S), jnp.int32), seen_BM.astype(jnp.int32))
        return _per_device(partial(splash.attend, causal=False), *heads, *ids)
    if on == "gpu" and cudnn.can_attend(*heads):
        masks = () if mask_BSM is None else (jnp.broadcast_to(mask_BSM, (B, S, M)),)
        return _per_device(cudnn.attend, *heads, *masks)
    query_BJGSA, key_BJMA, value_BJMA = _heads_first(*heads)
    return _positions_first(_read(query_BJGSA, key_BJMA, value_BJMA, mask_BSM))


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
    shared: bool = True,
    positions_BS: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Causal self-attention: position s sees the valid positions up to s, and always itself.

    With segment_BS, of those only segment 0 and its own; not `shared` says that no valid position is of segment 0. With a
    window, of those only the ones whose position, as positions_BS counts, is less than `window` before its own.

    What `train.remat="save-attention"` keeps is named here: the kernels keep more than the result.
    """
    S, on = query_BSKA.shape[1], _target()
    scaled_BSKA = query_BSKA * jnp.asarray(query_BSKA.shape[-1] ** -0.5, query_BSKA.dtype)
    heads = (scaled_BSKA, key_BSJA, value_BSJA)
    windowed, parted = window is not None and window < S, segment_BS is not None and shared
    if on == "tpu" and splash.pays(S, S) and not windowed and not parted:
        own_BS = jnp.int32(1) if segment_BS is None else segment_BS + 1
        id_BS = jnp.where(valid_BS, own_BS, 0)
        return _per_device(partial(splash.attend, causal=True, save_as=ATTENTION), *heads, id_BS, id_BS)

    def mask(start: int, end: int) -> jax.Array:
        """mask_BSM of the rows from start to end, which see nothing from end on."""
        row_S, column_M = jnp.arange(start, end)[:, None], jnp.arange(end)[None, :]
        mask_BSM = (column_M < row_S) & valid_BS[:, None, :end] | (column_M == row_S)
        if segment_BS is not None:
            of_key_BSM = segment_BS[:, None, :end]
            mask_BSM &= (of_key_BSM == 0) | (of_key_BSM == segment_BS[:, start:end, None])
        if window is not None:
            assert positions_BS is not None, "a window counts positions"
            mask_BSM &= positions_BS[:, start:end, None] - positions_BS[:, None, :end] < window
        return mask_BSM

    if on == "gpu" and cudnn.can_attend(*heads):
        return _per_device(cudnn.attend, *heads, mask(0, S))
    query_BJGSA, key_BJMA, value_BJMA = _heads_first(*heads)
    block = -(-S // _CAUSAL_BLOCKS)
    blocks = []
    for start in range(0, S, block):
        end = min(start + block, S)
        seen = (query_BJGSA[:, :, :, start:end], key_BJMA[:, :, :end], value_BJMA[:, :, :end])
        blocks.append(_read(*seen, mask(start, end)))
    return checkpoint_name(_positions_first(jnp.concatenate(blocks, axis=3)), ATTENTION)


def _target() -> str:
    """Platform of the machine that the step is compiled for: "cpu", "gpu", "tpu"; "" where no mesh says so."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", "")


def _per_device(
    kernel: Callable[..., jax.Array],
    query_BSKA: jax.Array,
    key_BMJA: jax.Array,
    value_BMJA: jax.Array,
    *of_rows: jax.Array,
) -> jax.Array:
    """BSKA by `kernel`, run by every device of the current mesh for its own rows and, where tensor divides them, heads.

    Fewer key/value heads than tensor asks for are repeated, if that helps. of_rows: what else leads with B.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (rows,) = spec("B", query_BSKA.shape[:1], mesh)
    K, J, ways = query_BSKA.shape[2], key_BMJA.shape[2], mesh.shape["tensor"]
    copies = ways // math.gcd(J, ways)
    by_heads = "tensor" if ways > 1 and K % (J * copies) == 0 else None
    if by_heads and copies > 1:
        key_BMJA, value_BMJA = (jnp.repeat(x, copies, axis=2) for x in (key_BMJA, value_BMJA))
    heads, row = PartitionSpec(rows, None, by_heads, None), PartitionSpec(rows)
    placed = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, *(row for _ in of_rows)), out_specs=heads, check_vma=False
    )
    return placed(query_BSKA, key_BMJA, value_BMJA, *of_rows)


def _heads_first(query_BSKA: jax.Array, key_BMJA: jax.Array, value_BMJA: jax.Array) -> tuple[jax.Array, ...]:
    """query_BJGSA, the G = K / J heads that share key/value head j side by side; key_BJMA, value_BJMA."""
    (B, S, K, A), J = query_BSKA.shape, key_BMJA.shape[2]
    query_BJGSA = query_BSKA.reshape(B, S, J, K // J, A).transpose(0, 2, 3, 1, 4)
    return query_BJGSA, key_BMJA.transpose(0, 2, 1, 3), value_BMJA.transpose(0, 2, 1, 3)


def _read(query_BJGSA: jax.Array, key_BJMA: jax.Array, value_BJMA: jax.Array, mask_BSM: jax.Array | None) -> jax.Array:
    """BJGSA. G and S are one axis in both products: a derivative that sums over two has no fast path on a CPU."""
    B, J, G, S, A = query_BJGSA.shape
    query_BJIA = query_BJGSA.reshape(B, J, G * S, A)
    logits_BJIM = jnp.einsum("BJIA,BJMA->BJIM", query_BJIA, key_BJMA, preferred_element_type=jnp.float32)
    if mask_BSM is not None:
        logits_BJGSM = logits_BJIM.reshape(B, J, G, S, -1)
        logits_BJIM = jnp.where(mask_BSM[:, None, None], logits_BJGSM, _HIDDEN).reshape(logits_BJIM.shape)
    weights_BJIM = jax.nn.softmax(logits_BJIM).astype(value_BJMA.dtype)
    return jnp.einsum("BJIM,BJMA->BJIA", weights_BJIM, value_BJMA).reshape(query_BJGSA.shape)


def _positions_first(read_BJGSA: jax.Array) -> jax.Array:
    B, J, G, S, A = read_BJGSA.shape
    return read_BJGSA.transpose(0, 3, 1, 2, 4).reshape(B, S, J * G, A)


def attention_weights(
    query_BSKA: jax.Array, key_BMKA: jax.Array, *, mask_BSM: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """The softmax weights BKSM themselves, float32, for pictures of who looks where."""
    factor = query_BSKA.shape[-1] ** -0.5 if scale is None else scale
    logits_BKSM = jnp.einsum("BSKA,BMKA->BKSM", query_BSKA, key_BMKA).astype(jnp.float32) * factor
    if mask_BSM is not None:
        logits_BKSM = jnp.where(mask_BSM[:, None], logits_BKSM, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits_BKSM)
