"""Frozen kernels in 8 or 4 bits that stay so in memory and on the way between devices.

    int8    kernel_CE ~ codes_CE * scale_E        one scale per output; half of bfloat16's bytes
    nf4     kernel_CE ~ table[codes_CE] * scale   one scale per output and tile of 64 inputs; 0.28 of bfloat16's bytes

Codes and scales are qwix's (github.com/google/qwix; nf4: Dettmers et al. 2023, QLoRA); two codes of 4 bits share a byte.
A product makes floats of the codes for its own duration only, and again in the backward pass. Under fsdp it is the codes
that are gathered (tcjax.nn.dense): XLA by itself would make floats first and gather those.
Departures from QLoRA: the scales are float32 and not quantised themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

TYPES = ("int8", "nf4")
TILE = 64


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("kind",))
@dataclass(frozen=True)
class Quantised:
    """What a Variable holds instead of an array [..., in, out].

    codes: int8 [..., in, out], or for nf4 uint8 [..., in / 2, out]. scale: float32 [..., tiles, out].
    kind: one of TYPES.
    """

    codes: jax.Array
    scale: jax.Array
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        *others, num_in, num_out = self.codes.shape
        return (*others, num_in * (2 if self.kind == "nf4" else 1), num_out)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def whole(self, dtype: Any) -> jax.Array:
        """The array that it stands for."""
        qwix, codes = _qwix(), self.codes
        if self.kind == "nf4":
            codes = jnp.stack([codes & 15, codes >> 4], axis=-2).reshape(self.shape).astype(jnp.uint4)
        return qwix.dequantize(qwix.QArray(codes, self.scale, qtype=_qtype(self.kind))).astype(dtype)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"these weights lie as {self.kind}; load them with train.frozen='float32' to read or write them."
        )


def quantise(kernel: jax.Array, kind: str) -> Quantised:
    """[..., in, out] with all leading axes apart; to be jitted. ValueError where nf4 finds no tile."""
    *others, num_in, _ = kernel.shape
    every = (*range(len(others)), kernel.ndim - 1)
    tiles = {}
    if kind == "nf4":
        if math.gcd(num_in, TILE) < 8:
            raise ValueError(
                f"frozen='nf4' needs kernels whose inputs come in tiles of 8 to {TILE}, and {num_in} inputs do not; "
                "use frozen='int8'."
            )
        tiles = {kernel.ndim - 2: math.gcd(num_in, TILE)}
    array = _qwix().quantize(
        kernel.astype(jnp.float32), _qtype(kind), channelwise_axes=every, tiled_axes=tiles, scale_dtype=jnp.float32
    )
    codes = array.qvalue
    if kind == "nf4":
        pairs = codes.astype(jnp.uint8).reshape(*others, num_in // 2, 2, -1)
        codes = pairs[..., 0, :] | (pairs[..., 1, :] << 4)
    return Quantised(codes, array.scale, kind)


def is_quantised(value: Any) -> bool:
    return isinstance(value, Quantised)


def kind_of(tree: Any) -> str:
    """How the weights of a module or state lie: one of TYPES if any is quantised, else the name of their type."""
    kinds = {x.kind if is_quantised(x) else x.dtype.name for x in jax.tree.leaves(tree, is_leaf=is_quantised)}
    return next((kind for kind in TYPES if kind in kinds), ", ".join(sorted(kinds)))


def _qtype(kind: str) -> Any:
    return {"int8": jnp.int8, "nf4": "nf4"}[kind]


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ValueError("frozen='int8' and 'nf4' need qwix: pip install 'tcjax[quantised]'.") from error
    return qwix
