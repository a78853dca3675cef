"""The C-Abstractor against Honeybee's own.

golden/c_abstractor.safetensors holds weights, inputs and outputs of kakaobrain/honeybee 68a8d84, class CAbstractor, run
with timm 0.9.8 (1.0.31 gives the same bits) on a CPU; for "rectangle" its own net, with AdaptiveAvgPool2d((3, 2)) and a
4 x 7 grid in place of squares. "start" has weights as at Honeybee's start, N(0, 0.02): there the norms' eps shows.
"""

import numpy as np
import pytest
import torch
from flax import nnx

from tcjax.compressors import c_abstractor
from tcjax.compressors.base import Widths
from tcjax.export.torch import c_abstractor as room
from tests.honeybee import golden, original, same_weights
from tests.planted import leaves, noise, planted
from tests.torch_layers import compress, loaded, off, twin

GOLDEN = golden("c_abstractor")
CASES = {  # name: (grid, config)
    "square": ((4, 4), c_abstractor.Config(num_queries=4, hidden=16)),
    "overlap": ((6, 6), c_abstractor.Config(num_queries=16, depth=2, hidden=8, mlp_depth=3, prenorm=True)),
    "odd": ((27, 27), c_abstractor.Config(depth=1, hidden=8, mlp_depth=1, pos_emb=False)),
    "start": ((5, 5), c_abstractor.Config(num_queries=9, hidden=16)),
    "rectangle": ((4, 7), c_abstractor.Config(num_queries=6, shape=(3, 2), depth=2, hidden=14)),  # 14 / 4 -> 4
}


def case_of(name: str):
    grid_HW, config = CASES[name]
    return config, original(GOLDEN, name, grid_HW)


@pytest.mark.parametrize("case", CASES)
def test_equals_honeybee(case):
    config, one = case_of(case)
    module = loaded(config, one.widths, one.weights)
    assert off(compress(module, one.x_BNC).tokens_BQD, one.y_BQD) < 3e-6
    same_weights(module, config, one)


@pytest.mark.parametrize("case", CASES)
def test_the_twin_takes_honeybees_weights_as_they_are(case):
    config, one = case_of(case)
    theirs = twin(room, config, one.widths, one.weights)
    assert off(theirs(torch.from_numpy(one.x_BNC)).detach(), one.y_BQD) < 3e-6


def test_another_eps_would_show(monkeypatch):
    """Blocks have 1e-5, timm's norm-and-activation layer, though its 2-D LayerNorm has 1e-6."""
    monkeypatch.setattr(c_abstractor, "_EPS", 1e-6)
    config, one = case_of("start")
    module = loaded(config, one.widths, one.weights)
    assert off(compress(module, one.x_BNC).tokens_BQD, one.y_BQD) > 1e-4


def test_the_callers_tokens_stay_as_they_are():
    """Honeybee adds its positions in place."""
    config, one = case_of("square")
    tokens = torch.from_numpy(one.x_BNC.copy())
    twin(room, config, one.widths, one.weights)(tokens)
    np.testing.assert_array_equal(tokens.numpy(), one.x_BNC)


@pytest.mark.parametrize(
    ("side", "hidden", "parameters"), [(16, 1024, 37_070_336), (24, 1024, 37_398_016), (16, 768, 30_198_464)]
)
def test_has_as_many_parameters_as_honeybees(side, hidden, parameters):
    """Counted on the original: 1024 to 4096 wide, 3 blocks, pooling to 12 x 12, 3 blocks, 2 linear layers."""
    config = c_abstractor.Config(hidden=hidden)
    widths = Widths(grid_HW=(side, side), vision_C=1024, llm_D=4096)
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    sizes = {path: leaf.get_value().size for path, leaf in leaves(module).items()}
    assert sum(sizes.values()) == parameters
    assert {name.jax for name in config.names(widths)} == sizes.keys()
    assert config.outputs(widths) == 144


def test_no_weight_knows_the_number_of_queries():
    widths = Widths(grid_HW=(27, 27), vision_C=6, llm_D=5)
    config = c_abstractor.Config(hidden=8, depth=1)
    module = planted(config, widths)
    x_BNC = noise(1, 729, 6)
    for num_queries in (1, 144):
        other = config.at(num_queries).build(widths, nnx.Rngs(1))
        nnx.update(other, nnx.state(module))
        assert compress(other, x_BNC).tokens_BQD.shape == (1, num_queries, 5)


def test_starts_as_honeybee_does():
    """Linear layers, convolutions and positions N(0, 0.02), biases 0; nothing is cut off at two deviations."""
    config = c_abstractor.Config(num_queries=4, hidden=48, depth=3, prenorm=True)
    module = config.build(Widths(grid_HW=(8, 8), vision_C=32, llm_D=64), nnx.Rngs(0))
    value = {path: np.asarray(leaf.get_value()) for path, leaf in leaves(module).items()}
    for path, array in value.items():
        if path.endswith("scale"):
            assert (array == 1).all(), path
        elif path.endswith("bias"):
            assert (array == 0).all(), path
        else:
            np.testing.assert_allclose(array.std(), 0.02, rtol=4 / array.size**0.5, err_msg=path)
    assert np.abs(value["after/rest/conv3/kernel"]).max() > 3 * 0.02
    assert not np.array_equal(value["after/rest/conv1/kernel"][0], value["after/rest/conv1/kernel"][1])


def test_a_padded_image_is_the_image_cut_to_what_is_real():
    """Two of six columns are padding, one of the three bins of a row: norms' biases must not leak into convolutions."""
    wide, narrow = (Widths(grid_HW=(4, W), vision_C=10, llm_D=6) for W in (6, 4))
    config = c_abstractor.Config(num_queries=6, shape=(2, 3), hidden=14, depth=2, prenorm=True)
    small = c_abstractor.Config(num_queries=4, hidden=14, depth=2, prenorm=True)
    module = planted(config, wide)
    real_N = np.tile(np.arange(6) < 4, 4)
    cut = small.build(narrow, nnx.Rngs(0))
    state = nnx.state(module)
    state["pos"] = nnx.Param(module.pos[...][real_N], axes="NC")
    nnx.update(cut, state)
    x_BNC = noise(2, 24, 10)
    out = compress(module, x_BNC, valid_BN=np.broadcast_to(real_N, (2, 24)))
    real_Q = np.array([True, True, False] * 2)
    np.testing.assert_array_equal(out.valid_BQ, [real_Q] * 2)
    np.testing.assert_allclose(out.tokens_BQD[:, real_Q], compress(cut, x_BNC[:, real_N]).tokens_BQD, atol=1e-5)


def test_a_half_padded_bin_is_the_mean_of_its_real_tokens():
    """Without blocks: by hand."""
    widths = Widths(grid_HW=(2, 4), vision_C=5, llm_D=6)
    config = c_abstractor.Config(num_queries=2, shape=(1, 2), depth=0, mlp_depth=1, pos_emb=False)
    module = planted(config, widths)
    x_BNC, valid_BN = noise(1, 8, 5), np.array([[1, 1, 1, 0, 0, 1, 0, 0]], bool)
    out = compress(module, x_BNC, valid_BN=valid_BN)
    kernel, bias = (np.asarray(leaf) for leaf in (module.readout[0].kernel[...], module.readout[0].bias[...]))
    means_QC = np.stack([x_BNC[0, [0, 1, 5]].mean(0), x_BNC[0, 2]])
    np.testing.assert_allclose(out.tokens_BQD[0], means_QC @ kernel + bias, atol=1e-5)
    third = np.array([1, 1, 0, 0, 0, 1, 0, 0]) / 3
    np.testing.assert_allclose(out.assign_BQN[0], [third, np.eye(8)[2]], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (c_abstractor.Config(num_queries=9, shape=(2, 4)), r"has 8 .* 4x6 grid: \[\(3, 3\)\]"),
        (c_abstractor.Config(num_queries=4, mlp_depth=0), "mlp_depth=0: must be at least 1"),
        (c_abstractor.Config(num_queries=4, depth=-1), "depth=-1: must be at least 0"),
        (c_abstractor.Config(num_queries=4, hidden=2), "vision_C=12, hidden=2: both must be at least 3"),
    ],
)
def test_impossible_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(Widths(grid_HW=(4, 6), vision_C=12, llm_D=16), nnx.Rngs(0))
    with pytest.raises(ValueError, match="wrap it in per_frame"):
        c_abstractor.Config().outputs(Widths(grid_HW=(16, 16), vision_C=12, llm_D=16, frames=2))
