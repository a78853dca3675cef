"""TokenLearner against google-research/scenic, commit 03c3032: TokenLearnerModuleV11 of projects/token_learner/model.py.

tests/golden/token_learner.safetensors holds that class's parameters (random), inputs and outputs, computed by flax.linen.
Its second bias is in the file and not in ours: the softmax over the image cancels it.
"""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tcjax.compressors import token_learner
from tcjax.compressors.base import Context, Widths
from tests.planted import leaves, noise, planted

GOLDEN = load_file(Path(__file__).parent / "golden/token_learner.safetensors")
OURS = {
    "norm/scale": "LayerNorm_0/scale",
    "norm/bias": "LayerNorm_0/bias",
    "hidden/kernel": "token_masking/Dense_0/kernel",
    "hidden/bias": "token_masking/Dense_0/bias",
    "maps/kernel": "token_masking/Dense_1/kernel",
}
WIDTHS = Widths(grid_HW=(4, 6), vision_C=12, llm_D=16)


def built():
    """Scenic's weights; our own projection planted."""
    module = planted(token_learner.Config(num_queries=5), WIDTHS)
    for path, leaf in leaves(module).items():
        if path in OURS:
            leaf.set_value(GOLDEN[OURS[path]])
    return module


@nnx.jit
def compress(module, x_BNC, valid_BN=None):
    return module(x_BNC, Context(valid_BN, assign=True))


@pytest.mark.parametrize("case", ["square", "wide", "one"])
def test_equals_scenic(case):
    module, x_BNC, expected_BQC = built(), GOLDEN[f"{case}.in"], GOLDEN[f"{case}.out"]
    found = compress(module, x_BNC)
    merged_BQC = np.einsum("BQN,BNC->BQC", found.assign_BQN, x_BNC)
    np.testing.assert_allclose(merged_BQC, expected_BQC, atol=2e-6 * np.abs(expected_BQC).max())
    np.testing.assert_allclose(found.tokens_BQD, module.out(expected_BQC), atol=1e-5)


def test_padding_is_in_no_map():
    module, x_BNC, expected_BQC = built(), GOLDEN["wide.in"], GOLDEN["wide.out"]
    padded_BNC = np.concatenate([x_BNC, np.full((2, 9, 12), np.nan, np.float32)], axis=1)
    found = compress(module, padded_BNC, np.tile(np.arange(24) < 15, (2, 1)))
    np.testing.assert_allclose(found.tokens_BQD, module.out(expected_BQC), atol=1e-5)


def test_starts_as_scenic_does():
    """Xavier-uniform kernels, biases all but 0."""
    config = token_learner.Config(num_queries=32)
    value = {path: np.asarray(leaf.get_value()) for path, leaf in leaves(config.build(WIDTHS, nnx.Rngs(0))).items()}
    for path, bound in {"hidden/kernel": (6 / (12 + 64)) ** 0.5, "maps/kernel": (6 / (64 + 32)) ** 0.5}.items():
        np.testing.assert_allclose(np.abs(value[path]).max(), bound, rtol=0.02)
        np.testing.assert_allclose(value[path].std(), bound / 3**0.5, rtol=0.06)
    assert 0 < np.abs(value["hidden/bias"]).max() < 1e-5


def test_sizes_at_a_7b_model():
    big = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096)
    module = nnx.eval_shape(lambda: token_learner.Config().build(big, nnx.Rngs(0)))
    size = sum(leaf.get_value().size for leaf in leaves(module).values())
    assert size == 2 * 1024 + 1024 * 64 + 64 + 64 * 64 + 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def test_the_hidden_width_is_checked():
    with pytest.raises(ValueError, match=r"hidden=0: .* at least 1"):
        token_learner.Config(hidden=0).build(WIDTHS, nnx.Rngs(0))


def test_images_larger_than_the_tower_saw_are_read_too():
    assert compress(built(), noise(1, 729, 12)).tokens_BQD.shape == (1, 5, 16)
