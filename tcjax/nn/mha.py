"""torch's nn.MultiheadAttention: queries, keys and values of one width E, projected by one packed matrix.

    y = W_o softmax(q k^T / sqrt(A)) v        [q | k | v] = [Q W_q | K W_k | V W_v] + b,  A = E / heads

`in_proj` holds the three side by side, [E, 3 E]: the published layout (rows q, k, v of in_proj_weight). It starts
Xavier-uniform over the packed matrix, biases 0, as torch's does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.nn.attention import attend, attention_weights
from tcjax.nn.dense import dense, rows, torch_uniform


class MultiheadAttention(nnx.Module):
    """out_init: of out_proj, the one that a resampler's trunc_normal_ reaches; torch's own default if not given."""

    def __init__(self, width: int, heads: int, *, out_init: initializers.Initializer = torch_uniform, rngs: nnx.Rngs):
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} must divide the width {width} of the attention.")
        self.heads = heads
        self.in_proj = dense("EI", width, 3 * width, init=initializers.xavier_uniform(), rngs=rngs)
        self.out_proj = dense("EE", width, width, init=out_init, rngs=rngs)

    def __call__(
        self,
        query_BSE: jax.Array,
        key_BME: jax.Array,
        value_BME: jax.Array,
        *,
        mask_BSM: jax.Array | None = None,
        weights: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """What S positions read from M, BSE, and if `weights` the head-mean of the attention, BSM in float32.

        B of queries or keys may be 1, then they are projected once for all rows.
        mask_BSM: True where s may see m, B or S may be 1; give every row one True.
        """
        query_BSKA, key_BMKA, value_BMKA = self.project(query_BSE, key_BME, value_BME)
        B = max(len(query_BSKA), len(key_BMKA), len(value_BMKA))
        query_BSKA, key_BMKA, value_BMKA = (
            jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (query_BSKA, key_BMKA, value_BMKA)
        )
        read_BSKA = attend(query_BSKA, key_BMKA, value_BMKA, mask_BSM=mask_BSM)
        out_BSE = self.out_proj(read_BSKA.reshape(*read_BSKA.shape[:2], -1))
        if not weights:
            return out_BSE, None
        return out_BSE, attention_weights(query_BSKA, key_BMKA, mask_BSM=mask_BSM).mean(1)

    def project(
        self, query_BSE: jax.Array, key_BME: jax.Array, value_BME: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values with their heads apart: BSKA, BMKA, BMKA."""
        kernels = jnp.split(self.in_proj.kernel[...], 3, axis=1)
        assert self.in_proj.bias is not None
        biases = jnp.split(self.in_proj.bias[...], 3)
        inputs = (query_BSE, key_BME, value_BME)
        return tuple(  # pyright: ignore[reportReturnType]
            (rows(x, kernel) + bias).reshape(*x.shape[:2], self.heads, -1)
            for x, kernel, bias in zip(inputs, kernels, biases, strict=True)
        )


def num_heads(width: int, head_width: int) -> int:
    """width / head_width; ValueError if that is not whole."""
    if head_width < 1 or width % head_width:
        possible = [each for each in range(1, width + 1) if width % each == 0]
        raise ValueError(
            f"head_width={head_width} does not divide the attention's width {width}; possible: {possible}."
        )
    return width // head_width
