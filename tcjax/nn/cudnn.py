"""cuDNN's attention for GPUs, through `jax.nn.dot_product_attention`: the logits stay on the chip.

It attends in bfloat16 and float16 with heads whose width is a multiple of 8 up to 128, grouped or not; everything else is
left to plain products. Masks go in as a bias [B, 1, S, M] that all heads share, since padding and segments may be anywhere.
No GPU is needed to compile for one, only cuDNN's library (the package nvidia-cudnn-cu13; `jax[cuda13]` brings it).
"""

from __future__ import annotations

import warnings
from functools import cache, partial
from threading import Thread
from typing import Literal

import jax
import jax.numpy as jnp

_DTYPES = (jnp.bfloat16, jnp.float16)


def can_attend(query_BSKA: jax.Array, key_BMJA: jax.Array, value_BMJA: jax.Array) -> bool:
    """Whether cuDNN takes these. If it could and does not work here, a warning says why, once."""
    A, dtypes = query_BSKA.shape[-1], {x.dtype for x in (query_BSKA, key_BMJA, value_BMJA)}
    if len(dtypes) > 1 or dtypes.pop() not in _DTYPES or A % 8 or A > 128:
        return False
    fault = _fault(A, query_BSKA.shape[2] // key_BMJA.shape[2], query_BSKA.dtype.name)
    if fault:
        warnings.warn(
            f"attention is computed plainly, which is slower and needs more memory, since cuDNN does not work: {fault}. "
            "pip install 'jax[cuda13]' brings the version that JAX is made for.",
            stacklevel=2,
        )
    return not fault


def attend(
    query_BSKA: jax.Array,
    key_BMJA: jax.Array,
    value_BMJA: jax.Array,
    mask_BSM: jax.Array | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """BSKA; the query is already scaled. implementation: "xla" is the same in plain JAX, for tests."""
    look = partial(jax.nn.dot_product_attention, scale=1.0, implementation=implementation)
    if mask_BSM is None:
        return look(query_BSKA, key_BMJA, value_BMJA)
    S, odd_S, odd_M = mask_BSM.shape[1], mask_BSM.shape[1] % 2, mask_BSM.shape[2] % 2  # no gradient with odd masks
    query_BSKA, key_BMJA, value_BMJA = (
        jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) if odd else x
        for x, odd in ((query_BSKA, odd_S), (key_BMJA, odd_M), (value_BMJA, odd_M))
    )
    mask_BSM = jnp.pad(mask_BSM, ((0, 0), (0, odd_S), (0, odd_M)))
    return look(query_BSKA, key_BMJA, value_BMJA, mask=mask_BSM[:, None])[:, :S]


@cache
def _fault(A: int, group: int, dtype: str) -> str:
    """Why a step with such heads would fail, "" if it would not.

    Without cuDNN's library it cannot be traced. On a GPU it is compiled once, small: some pairs of CUDA and cuDNN have no
    kernel for it (https://github.com/jax-ml/jax/issues/32430). Elsewhere one compiles for a GPU that has them.
    """
    found = []

    def loss(query_BSKA, key_BMJA, value_BMJA, mask_BSM):
        return attend(query_BSKA, key_BMJA, value_BMJA, mask_BSM).astype(jnp.float32).sum()

    def tried() -> None:
        heads = [jax.ShapeDtypeStruct((2, 128, num, A), dtype) for num in (group, 1, 1)]
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*heads, jax.ShapeDtypeStruct((2, 128, 128), bool))
        if jax.default_backend() == "gpu":
            traced.lower().compile()

    def run() -> None:
        try:
            tried()
        except Exception as error:  # whatever it is, plain products do without
            found.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    thread = Thread(target=run)  # the mesh and the trace around this call are another thread's
    thread.start()
    thread.join()
    return found[0].rstrip(".") if found else ""
