"""Top-k: the soft shares sum to k and have the gradient of their finite differences; of equals the earlier is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tcjax.export.torch import learned_merge as twin
from tcjax.nn.top_k import soft_top_k, top_indices
from tests.planted import noise


def test_shares_sum_to_k_and_follow_the_scores():
    for spread in (1e-4, 1, 30):
        logits_BN, valid_BN = spread * noise(4, 729), noise(4, 729, seed=1) < 1
        share_BN = np.asarray(soft_top_k(logits_BN, valid_BN, jnp.array([1, 64, 500, 729])))
        wanted_B = np.minimum([1, 64, 500, 729], valid_BN.sum(1))
        np.testing.assert_allclose(share_BN.sum(1), wanted_B, rtol=2e-6, atol=2e-3)
        np.testing.assert_allclose(share_BN.sum(1)[:3], [1, 64, 500], rtol=2e-5)
        assert (share_BN[~valid_BN] == 0).all()
        assert ((share_BN >= 0) & (share_BN <= 1)).all()
        for b in range(4):
            assert (np.diff(share_BN[b][valid_BN[b]][np.argsort(logits_BN[b][valid_BN[b]])]) >= 0).all()


def test_the_gradient_of_the_shares_is_their_finite_difference():
    with jax.enable_x64(True):
        logits_BN, valid_BN = jnp.asarray(noise(2, 9), jnp.float64), jnp.asarray(noise(2, 9, seed=1) < 1)
        target_BN, k_B = jnp.asarray(noise(2, 9, seed=2), jnp.float64), jnp.array([3, 5])

        def total(logits_BN):
            return (soft_top_k(logits_BN, valid_BN, k_B) * target_BN).sum()

        grad_BN = np.asarray(jax.grad(total)(logits_BN))
        for b in range(2):
            for n in range(9):
                step_BN = jnp.zeros((2, 9), jnp.float64).at[b, n].set(1e-4)
                difference = (total(logits_BN + step_BN) - total(logits_BN - step_BN)) / 2e-4
                np.testing.assert_allclose(grad_BN[b, n], difference, atol=2e-9)
        np.testing.assert_allclose(grad_BN.sum(1), 0, atol=1e-12)


def test_of_equal_scores_the_earlier_token_stays_here_and_there():
    score_BN = np.array([[1, 2, 2, 0, 2, 1], [0, 0, 0, 0, 0, 0]], np.float32)
    valid_BN = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0]], bool)
    ours_BQ = top_indices(score_BN, valid_BN, jnp.minimum(valid_BN.sum(1), 4), 4)
    np.testing.assert_array_equal(ours_BQ, [[0, 1, 2, 4], [1, 3, 6, 6]])
    theirs_BQ = twin.top_indices(torch.tensor(score_BN), torch.tensor(valid_BN), 4)
    np.testing.assert_array_equal(ours_BQ, theirs_BQ.numpy())
    alike = torch.tensor([[3.0, 5.0, 5.0, 1.0]]).expand(7, 4)
    np.testing.assert_array_equal(twin.first_largest(alike), 1)
