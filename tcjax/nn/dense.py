"""Linear layers whose kernels remember their letters: `dense("CD", C, D, rngs=rngs)` holds kernel_CD and bias_D."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.nn.quantised import Quantised
from tcjax.sharding import gathers, whole

small_normal = initializers.normal(0.02)  # embeddings; the resamplers' trunc_normal_(.02) is this too
# N(0, 1/fan_in). Llama's and CLIP's 0.02 is this at width 2500; at width 100 it would start every attention uniform.
fan_in_normal = initializers.variance_scaling(1.0, "fan_in", "normal")
# torch's nn.Linear default, kaiming_uniform(a=sqrt 5): U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the bias likewise.
torch_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Dense(nnx.Linear):
    """y = x @ kernel + bias, and what an attached update adds (tcjax.nn.lora). axes: of the kernel, without a stack's L.

    A frozen kernel may also be `Quantised`.
    """

    axes: str
    lora: Any = None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel = self.kernel.get_value()
        if isinstance(kernel, Quantised) or gathers():
            out = _gathered_times(inputs, kernel, self.axes)
            out = out if self.bias is None else out + self.bias[...].astype(out.dtype)
        else:
            out = super().__call__(inputs)
        return out if self.lora is None else out + self.lora(inputs)


def dense(
    axes: str,
    num_in: int,
    num_out: int,
    *,
    bias: bool = True,
    init: jax.nn.initializers.Initializer = fan_in_normal,
    rngs: nnx.Rngs,
) -> Dense:
    """y = x @ kernel + bias with float32 parameters; `axes` names the kernel's letters, e.g. "CD"."""
    layer = Dense(
        num_in,
        num_out,
        use_bias=bias,
        kernel_init=init,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[-1]},
        dot_general=_dot_general,
        rngs=rngs,
    )
    layer.axes = axes
    return layer


def _gathered_times(x: jax.Array, kernel: jax.Array | Quantised, axes: str) -> jax.Array:
    """x @ kernel; what is kept for the backward pass is this device's share of the kernel, and codes, not their floats."""

    @jax.checkpoint
    def times(x: jax.Array, kernel: jax.Array | Quantised) -> jax.Array:
        used = whole(kernel, axes)
        return rows(x, used.whole(x.dtype) if isinstance(used, Quantised) else used)

    return times(x, kernel)


def rows(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """x @ kernel with all leading axes of x as one: its gradient is then one plain matrix product.

    XLA's CPU backend has no fast path for a contraction over two axes: the whole backward pass takes twice as long.
    """
    dtype = jnp.result_type(x, kernel)
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    product = jax.lax.dot_general(flat, kernel.astype(dtype), (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[:-1], -1)


def _dot_general(x: jax.Array, kernel: jax.Array, _: Any, **options: Any) -> jax.Array:
    return rows(x, kernel, **options)
