"""The 16x convolutions against transformers' UnlimitedOcr, whose vision tower is DeepSeek-OCR's: its neck and projection."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.unlimited_ocr import modeling_unlimited_ocr as original

from tcjax.compressors import conv16
from tcjax.compressors.base import Widths
from tcjax.nn.conv import halved, windows
from tests.planted import leaves, noise, planted
from tests.torch_layers import compress, conv_kernel, line, values

C, D, NECK = 12, 16, 6


def original_grid(value: dict, x: torch.Tensor, neck: int) -> torch.Tensor:
    """[B, C, H, W] through the original modules with our weights."""
    width = neck or x.shape[1]
    sizes = SimpleNamespace(hidden_size=x.shape[1], output_channels=width, downsample_channels=[2 * width, 4 * width])
    if neck:
        module = original.UnlimitedOcrSamVisionNeck(sizes)
        state = {
            "conv1.weight": torch.from_numpy(value["neck/narrow/kernel"].T.copy())[:, :, None, None],
            "conv2.weight": conv_kernel(value, "neck/near"),
        }
        for theirs, ours in (("layer_norm1", "neck/norm_narrow"), ("layer_norm2", "neck/norm_near")):
            state |= {f"{theirs}.weight": torch.from_numpy(value[f"{ours}/scale"])}
            state |= {f"{theirs}.bias": torch.from_numpy(value[f"{ours}/bias"])}
        module.load_state_dict(state, strict=True)
        x = module(x.permute(0, 2, 3, 1))
    module = original.UnlimitedOcrSamVisionProj(sizes)
    kernels = {"conv1.weight": conv_kernel(value, "first"), "conv2.weight": conv_kernel(value, "second")}
    module.load_state_dict(kernels, strict=True)
    return module(x)


def theirs(value: dict, x_BNC: np.ndarray, grid_HW: tuple[int, int], neck: int) -> np.ndarray:
    grid = torch.from_numpy(x_BNC).transpose(1, 2).unflatten(2, grid_HW)
    read = original_grid(value, grid, neck).flatten(2).transpose(1, 2)
    return line(value, "out_proj", read).numpy(force=True)


def build(grid_HW: tuple[int, int], neck: int) -> nnx.Module:
    return planted(conv16.Config(neck=neck), Widths(grid_HW=grid_HW, vision_C=C, llm_D=D))


@pytest.mark.parametrize("neck", [0, NECK])
@pytest.mark.parametrize("grid_HW", [(8, 8), (4, 6), (7, 9), (5, 3), (27, 27), (1, 2)])
def test_equals_deepseek_ocr(grid_HW, neck):
    module = build(grid_HW, neck)
    x_BNC = 2 * noise(2, grid_HW[0] * grid_HW[1], C) + 1
    expected_BQD = theirs(values(module), x_BNC, grid_HW, neck)
    assert expected_BQD.shape[1] == module.num_outputs == -(-grid_HW[0] // 4) * -(-grid_HW[1] // 4)
    largest = np.abs(expected_BQD).max()
    np.testing.assert_allclose(compress(module, x_BNC).tokens_BQD, expected_BQD, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("neck", [0, NECK])
@pytest.mark.parametrize("valid_HW", [(8, 8), (5, 11), (9, 2), (1, 1)])
def test_a_padded_image_gives_what_its_corner_gives_alone(valid_HW, neck):
    """What the first convolution would say of the padding beside the edge must not reach the second one."""
    (H, W), (h, w) = (10, 12), valid_HW
    module = build((H, W), neck)
    valid_BHW = np.zeros((1, H, W), bool)
    valid_BHW[:, :h, :w] = True
    x_BNC = noise(1, H * W, C)
    hidden_BNC = np.where(valid_BHW.reshape(1, -1, 1), x_BNC, np.float32(np.nan))
    out = compress(module, hidden_BNC, valid_BN=valid_BHW.reshape(1, -1))
    corner_BNC = x_BNC.reshape(1, H, W, C)[:, :h, :w].reshape(1, h * w, C).copy()
    expected_BQD = theirs(values(module), corner_BNC, (h, w), neck)
    found_QD = np.asarray(out.tokens_BQD)[np.asarray(out.valid_BQ)]
    np.testing.assert_allclose(found_QD, expected_BQD[0], rtol=0, atol=2e-6 * np.abs(expected_BQD).max())


def test_assignment_counts_the_ways_through_both_windows():
    rows = windows(4, stride=2) @ windows(8, stride=2)
    assert windows(8, stride=2).tolist()[:2] == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert rows.tolist() == [[1, 2, 1, 1, 0, 0, 0, 0], [0, 1, 1, 2, 1, 2, 1, 1]]
    share_QN = np.asarray(compress(build((8, 8), 0), noise(1, 64, C)).assign_BQN[0])
    np.testing.assert_allclose(share_QN, np.kron(rows, rows) / np.kron(rows, rows).sum(1, keepdims=True), atol=1e-7)


def test_an_output_of_stride_two_is_real_if_its_own_four_are():
    valid_HW = np.zeros((1, 5, 4), bool)
    valid_HW[0, 1, 2] = valid_HW[0, 4, 0] = True
    assert np.asarray(halved(valid_HW))[0].tolist() == [[False, True], [False, False], [True, False]]


def test_the_published_widths_have_the_published_sizes():
    """256 -> 512 -> 1024: 5,898,240; SAM's neck from 768: 787,456. On 64 x 64 tokens 256 outputs."""
    widths = Widths(grid_HW=(64, 64), vision_C=768, llm_D=1280)
    module = nnx.eval_shape(lambda: conv16.Config(neck=256).build(widths, nnx.Rngs(0)))
    size = {path: leaf.get_value().size for path, leaf in leaves(module).items()}
    assert size["first/kernel"] + size["second/kernel"] == 5_898_240
    assert sum(found for path, found in size.items() if path.startswith("neck")) == 787_456
    assert module.num_outputs == 256


def test_it_starts_as_torch_does():
    """U(-a, a) with a = 1 / sqrt(9 C); nothing but out_proj has a bias."""
    value = values(conv16.Config(neck=16).build(Widths(grid_HW=(4, 4), vision_C=32, llm_D=64), nnx.Rngs(0)))
    fans = {"neck/narrow": 32, "neck/near": 9 * 16, "first": 9 * 16, "second": 9 * 32, "out_proj": 64}
    for path, fan_in in fans.items():
        np.testing.assert_allclose(np.abs(value[f"{path}/kernel"]).max(), fan_in**-0.5, rtol=0.02, err_msg=path)
        np.testing.assert_allclose(value[f"{path}/kernel"].std(), (3 * fan_in) ** -0.5, rtol=0.06, err_msg=path)
    assert [path for path in value if path.endswith("bias") and "norm" not in path] == ["out_proj/bias"]
