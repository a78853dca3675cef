"""Top-k, hard and soft. Soft: shares p in (0, 1) of N candidates that sum to k, rise with the scores, have a gradient.

    p_n = sigmoid(z_n + tau)      with tau such that sum_n p_n = k

tau comes from a fixed number of halvings of an interval that surely holds it; the gradient is that of the solution,
by the implicit function theorem, not of the search:

    dL/dz = v g - v (sum v g) / (sum v)      v = p (1 - p), g = dL/dp

It sums to 0: raising one score lowers the others' shares. Divide the scores by a temperature beforehand; towards 0 the
shares become the hard top-k. Cost: 48 passes over N numbers, whatever k is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_HALVINGS = 48
_SHORT = 1e-3  # k of k candidates would need tau = infinity
_FAR = 1e9


@jax.custom_vjp
def soft_top_k(logits_BN: jax.Array, valid_BN: jax.Array, k_B: jax.Array) -> jax.Array:
    """The shares, 0 where not valid.

    Args:
        logits_BN: float32, finite also where not valid.
        k_B: how much the valid ones share; with no more candidates than that it is their number less 1e-3.
    """
    return _shares(logits_BN, valid_BN, k_B)


def top_indices(score_BN: jax.Array, valid_BN: jax.Array, k_B: jax.Array, num: int) -> jax.Array:
    """Where the k best valid tokens are, ascending, then N for the slots that are left; equal scores: the earlier."""
    N = score_BN.shape[1]
    _, best_BQ = jax.lax.top_k(jnp.where(valid_BN, score_BN, -jnp.inf), min(num, N))
    best_BQ = jnp.pad(best_BQ, ((0, 0), (0, num - best_BQ.shape[1])))
    return jnp.sort(jnp.where(jnp.arange(num) < k_B[:, None], best_BQ, N), axis=-1)


def taken(x_BNC: jax.Array, index_BQ: jax.Array) -> jax.Array:
    """Rows of x at the slots' tokens; an arbitrary one for a slot without."""
    return jnp.take_along_axis(x_BNC, jnp.minimum(index_BQ, x_BNC.shape[1] - 1)[..., None], axis=1)


def slots(index_BQ: jax.Array, N: int) -> tuple[jax.Array, jax.Array]:
    """For each token the slot that keeps it, and whether one does."""
    is_here_BQN = index_BQ[..., None] == jnp.arange(N)
    return is_here_BQN.argmax(1), is_here_BQN.any(1)


def _shares(logits_BN: jax.Array, valid_BN: jax.Array, k_B: jax.Array) -> jax.Array:
    dtype = logits_BN.dtype
    count_B = valid_BN.sum(-1).astype(dtype)
    wanted_B = jnp.minimum(k_B.astype(dtype), count_B - _SHORT)
    margin_B = 10 + jnp.log(jnp.maximum(count_B, 1))  # at the ends the shares sum to 5e-5, or lack as much
    low_B = -jnp.where(valid_BN, logits_BN, -_FAR).max(-1) - margin_B
    high_B = -jnp.where(valid_BN, logits_BN, _FAR).min(-1) + margin_B

    def at(tau_B: jax.Array) -> jax.Array:
        return jnp.where(valid_BN, jax.nn.sigmoid(logits_BN + tau_B[:, None]), 0)

    def halve(_, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = ends
        middle_B = (low_B + high_B) / 2
        too_much_B = at(middle_B).sum(-1) > wanted_B
        return jnp.where(too_much_B, low_B, middle_B), jnp.where(too_much_B, middle_B, high_B)

    low_B, high_B = jax.lax.fori_loop(0, _HALVINGS, halve, (low_B, high_B))
    return at((low_B + high_B) / 2)


def _forward(logits_BN: jax.Array, valid_BN: jax.Array, k_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    share_BN = _shares(logits_BN, valid_BN, k_B)
    return share_BN, share_BN


def _backward(share_BN: jax.Array, grad_BN: jax.Array) -> tuple[jax.Array, None, None]:
    slope_BN = share_BN * (1 - share_BN)  # 0 where not valid
    steepness_B1 = jnp.maximum(slope_BN.sum(-1, keepdims=True), jnp.finfo(slope_BN.dtype).tiny)
    mean_B1 = (slope_BN * grad_BN).sum(-1, keepdims=True) / steepness_B1
    return slope_BN * (grad_BN - mean_B1), None, None


soft_top_k.defvjp(_forward, _backward)
