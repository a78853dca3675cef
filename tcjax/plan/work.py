"""FLOPs that a step really executes: matrix multiplications, what remat computes twice included.

    useful (tcjax/evaluate/cost.py)    4 N per token behind a frozen weight, 6 N where it learns
    executed (here)                    the step's own jaxpr: 6 N for a frozen block under remat "full", its causal blocks
                                       without the pairs they skip, the loss over the vocabulary at its longest

The loss stops at the last supervised position of the batch, which is data: S / 32 turns are counted, all of it. Of a
cond the most expensive branch counts. Fused kernels (splash, cuDNN) say nothing about what they multiply: trace the
step without a mesh, or on one of CPU devices, and attention takes the plain path, whose FLOPs are counted. A fused
kernel skips at least those masked blocks and computes the weights once more in its backward pass.

Why not XLA's own count: tcjax/evaluate/flops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tcjax.evaluate.flops import matmul_bytes, matmul_flops


def executed_flops(function: Callable, *abstract_args: Any) -> int:
    """FLOPs of all devices together for one call of `function`: the trainer's step with its abstract state and batch.

    Args:
        function: not yet jitted for a device with fused kernels; nothing is compiled.
        abstract_args: arrays or jax.ShapeDtypeStructs, of the global batch.

    Returns:
        FLOPs = 2 * MACs; a [8, 16] @ [16, 32] counts 8_192.
    """
    return matmul_flops(function, *abstract_args, longest=True)


def hbm_bytes(function: Callable, *share: Any, gathered: int = 0, state: int = 0) -> int:
    """Bytes that one device moves between its memory and its cores in a step: an estimate.

        each matrix multiplication reads its operands and writes its result     (elementwise work is fused into it)
        what an all-gather hands over is written once before it is read
        what learns, its gradient and its moments are read and written once

    A weight is thereby read once per pass: forward, backward, and once more under remat. Attention weights count as
    written and read, which a fused kernel spares. Of tensor-parallel matrices the whole counts: there it is too much.

    Args:
        function: as in `executed_flops`.
        share: what one device sees: its rows of the batch, and every weight whole.
        gathered: bytes that all-gathers hand over, `Traffic.of("all-gather")`. state: bytes of what learns, its gradient
            and its moments on this device.
    """
    return matmul_bytes(function, *share, longest=True) + gathered + 2 * state
