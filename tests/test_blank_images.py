"""Rows with fewer images than slots carry zeros: no compressor divides by what is not there."""

import jax
import numpy as np
from flax import nnx

from tests.planted import noise
from tests.test_compressors import VALID_BN, _gradients, case  # noqa: F401  # the fixture is the examination's

READ_B = np.array([1, 0, 0], np.float32)[:, None, None]


def test_a_blank_image_nobody_reads_leaves_the_gradient_alone(case):  # noqa: F811
    compressor, num_queries, *_ = case
    target_BQD, x_BNC = noise(3, num_queries, 16, seed=9) * READ_B, noise(3, 24, 12)
    parts = nnx.split(compressor)
    (grads, _), (expected, _) = (
        _gradients(*parts, np.asarray(tokens_BNC, np.float32), VALID_BN, target_BQD)
        for tokens_BNC in (x_BNC * READ_B, x_BNC)
    )
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
