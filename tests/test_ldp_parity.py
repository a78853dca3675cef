"""LDPv2 against the original class (tests/golden/ldp_v2.safetensors), LDP against its formulas in torch's own operations.

ldp_v2.safetensors: Meituan-AutoML/MobileVLM, commit 688fdec, mobilevlm/model/vision_projector.py, LDPNetV2Projector with
mm_hidden_size=8 and hidden_size=12 on grids of 12, 15 and 24, random weights, torch 2.13 in float32. That file's LDPv1
needs timm and torchvision, so its blocks are written out here: torchvision's InvertedResidual without expansion, with
timm's LayerNormAct2d.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from tcjax.compressors import ldp, ldp_v2
from tcjax.compressors.base import Widths
from tcjax.export.torch import ldp_v2 as room
from tcjax.interop import tensors
from tests.planted import leaves, noise, planted
from tests.torch_layers import compress, conv_kernel, line, loaded, normed, ragged, section, twin, two, values

GOLDEN = Path(__file__).parent / "golden/ldp_v2.safetensors"
C, D = 8, 12


def widths(grid_HW: tuple[int, int], llm_D: int = D) -> Widths:
    return Widths(grid_HW=grid_HW, vision_C=C, llm_D=llm_D)


# LDPv2 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [12, 15, 24])
def test_ldp_v2_equals_the_original(side):
    """15 -> 12: the bins overlap."""
    golden = tensors.load(GOLDEN)
    weights, given = section(golden, "weights."), section(golden, f"{side}.")
    ours = compress(loaded(ldp_v2.Config(), widths((side, side)), weights), given["tokens"])
    np.testing.assert_allclose(ours.tokens_BQD, given["out"], atol=2e-6)
    theirs = twin(room, ldp_v2.Config(), widths((side, side)), weights)(torch.from_numpy(given["tokens"]))
    np.testing.assert_allclose(theirs.numpy(force=True), given["out"], atol=2e-6)


@pytest.mark.parametrize(("grid_HW", "shape"), [((8, 6), (4, 3)), ((9, 14), (4, 5)), ((27, 27), (12, 12))])
def test_ldp_v2_with_padding(grid_HW, shape):
    """Means of the valid, 0 where there is none, then the convolution."""
    (H, W), (h, w) = grid_HW, shape
    config = ldp_v2.Config(num_queries=h * w, shape=shape)
    module = planted(config, widths(grid_HW))
    value, x_BNC, valid_BN = values(module), noise(4, H * W, C), ragged(grid_HW)
    hidden_BNC = np.where(valid_BN[..., None], x_BNC, np.float32(np.nan))
    ours = compress(module, hidden_BNC, valid_BN=valid_BN)
    keep = torch.from_numpy(valid_BN.astype("f4")).reshape(4, 1, H, W)
    projected = two(value, "mlp", torch.from_numpy(x_BNC)).transpose(1, 2).reshape(4, D, H, W)
    share = functional.adaptive_avg_pool2d(keep, shape)
    mean = (functional.adaptive_avg_pool2d(projected * keep, shape) / share).nan_to_num(0)
    near = functional.conv2d(mean, conv_kernel(value, "peg"), torch.from_numpy(value["peg/bias"]), padding=1, groups=D)
    expected = ((mean + near) * (share > 0)).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(ours.tokens_BQD, expected.numpy(force=True), atol=4e-6)
    np.testing.assert_array_equal(ours.valid_BQ, (share > 0).flatten(1))


def test_the_default_of_ldp_v2_is_the_published_size():
    """6.3 M parameters at 1024 -> 2048, 144 tokens."""
    big = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=2048)
    module = nnx.eval_shape(lambda: ldp_v2.Config().build(big, nnx.Rngs(0)))
    assert sum(leaf.get_value().size for leaf in leaves(module).values()) == 6_316_032
    assert module.num_outputs == 144


# LDP ---------------------------------------------------------------------------------------------------------------------


def block(value: dict, name: str, grid: torch.Tensor, stride: int) -> torch.Tensor:
    """One image without padding, [1, D, H, W]."""

    def by_channel(norm, grid):
        return normed(value, f"{name}/{norm}", grid.movedim(1, -1), 1e-5).movedim(-1, 1)

    def pointwise(layer, grid):
        return line(value, f"{name}/{layer}", grid.movedim(1, -1)).movedim(-1, 1)

    near = functional.conv2d(grid, conv_kernel(value, f"{name}/near"), stride=stride, padding=1, groups=grid.shape[1])
    read = functional.hardswish(by_channel("norm_near", near))
    squeezed = functional.relu(pointwise("squeeze", functional.adaptive_avg_pool2d(read, 1)))
    out = by_channel("norm", pointwise("mix", read * functional.hardsigmoid(pointwise("excite", squeezed))))
    return out + grid if stride == 1 else out


def by_formula(value: dict, x: torch.Tensor, H: int, W: int) -> np.ndarray:
    grid = two(value, "mlp", x).transpose(1, 2).reshape(len(x), -1, H, W)
    grid = block(value, "blocks/1", block(value, "blocks/0", grid, 1), 2)
    return grid.flatten(2).transpose(1, 2).numpy(force=True)


@pytest.mark.parametrize("grid_HW", [(6, 6), (4, 7), (9, 5), (27, 27), (1, 1)])
def test_ldp_equals_its_formula(grid_HW):
    H, W = grid_HW
    module = planted(ldp.Config(), widths(grid_HW))
    x_BNC = 2 * noise(2, H * W, C) + 1
    expected_BQD = by_formula(values(module), torch.from_numpy(x_BNC), H, W)
    assert expected_BQD.shape[1] == -(-H // 2) * -(-W // 2) == module.num_outputs
    np.testing.assert_allclose(compress(module, x_BNC).tokens_BQD, expected_BQD, atol=5e-6)


@pytest.mark.parametrize("valid_HW", [(4, 4), (5, 3), (1, 7), (6, 8)])
def test_a_padded_image_gives_what_its_corner_gives_alone(valid_HW):
    """The mean over the channels' grid included."""
    (H, W), (h, w) = (6, 8), valid_HW
    module = planted(ldp.Config(), widths((H, W)))
    valid_HW = np.zeros((H, W), bool)
    valid_HW[:h, :w] = True
    x_BNC = noise(1, H * W, C)
    out = compress(
        module, np.where(valid_HW.reshape(1, -1, 1), x_BNC, np.float32(np.nan)), valid_BN=valid_HW.reshape(1, -1)
    )
    corner = torch.from_numpy(x_BNC.reshape(1, H, W, C)[:, :h, :w].reshape(1, h * w, C).copy())
    expected_BQD = by_formula(values(module), corner, h, w)
    np.testing.assert_allclose(np.asarray(out.tokens_BQD)[np.asarray(out.valid_BQ)], expected_BQD[0], atol=5e-6)


@pytest.mark.parametrize(("llm_D", "squeezed"), [(2048, 512), (4096, 1024), (2560, 640), (16, 8), (44, 16), (76, 24)])
def test_squeezed_channels_are_a_multiple_of_eight_and_never_far_below_a_quarter(llm_D, squeezed):
    assert ldp.squeezed(llm_D) == squeezed


def test_the_size_of_ldp_is_the_published_one():
    """18.9 M parameters at 1024 -> 2048; 576 tokens become 144."""
    big = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=2048)
    module = nnx.eval_shape(lambda: ldp.Config().build(big, nnx.Rngs(0)))
    one_block = 9 * 2048 + 2 * 2 * 2048 + 2 * 2048 * 512 + 512 + 2048 + 2048**2
    expected = 1024 * 2048 + 2048 + 2048**2 + 2048 + 2 * one_block
    assert sum(leaf.get_value().size for leaf in leaves(module).values()) == expected
    assert 18.85e6 < expected < 18.95e6
    assert module.num_outputs == 144


def test_both_start_as_torch_does():
    """Kernels U(-a, a), a = 1 / sqrt(fan_in), 1/3 for a depthwise 3 x 3; norms 1 and biases 0."""
    for config, fans in (
        (ldp_v2.Config(num_queries=4), {"mlp/linears/1": 64, "peg": 9}),
        (ldp.Config(), {"mlp/linears/0": C, "blocks/0/near": 9, "blocks/1/mix": 64, "blocks/1/excite": 16}),
    ):
        value = values(config.build(widths((4, 4), llm_D=64), nnx.Rngs(0)))
        for path, fan_in in fans.items():
            np.testing.assert_allclose(np.abs(value[f"{path}/kernel"]).max(), fan_in**-0.5, rtol=0.02, err_msg=path)
            np.testing.assert_allclose(value[f"{path}/kernel"].std(), (3 * fan_in) ** -0.5, rtol=0.08, err_msg=path)
        assert all((array == 0).all() for path, array in value.items() if path.endswith("bias"))
        assert all((array == 1).all() for path, array in value.items() if path.endswith("scale"))
