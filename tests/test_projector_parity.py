"""The projectors against their published modules in transformers, and pooling against torch's own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tcjax.compressors import avg_pool, mlp, pixel_shuffle
from tcjax.compressors.base import Context, Widths
from tests.planted import leaves, noise, planted

C, D = 12, 20
SIZES = {"vision_config": SimpleNamespace(hidden_size=C), "text_config": SimpleNamespace(hidden_size=D)}


def build(config, grid_HW):
    """The planted module and its weights as torch wants them: kernels transposed."""
    module = planted(config, Widths(grid_HW=grid_HW, vision_C=C, llm_D=D))
    tensors = {path: torch.from_numpy(np.asarray(leaf.get_value()).T.copy()) for path, leaf in leaves(module).items()}
    return module, tensors


def load_two_layers(twin: torch.nn.Module, tensors: dict, prefix: str, norm: dict[str, str] = {}):  # noqa: B006
    twin.load_state_dict(
        {
            f"linear_{k + 1}.{theirs}": tensors[f"{prefix}/linears/{k}/{ours}"]
            for k in (0, 1)
            for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        }
        | {theirs: tensors[ours] for theirs, ours in norm.items()}
    )
    return twin


def llava(tensors):
    settings = SimpleNamespace(
        **SIZES, vision_feature_layer=-2, projector_hidden_act="gelu", multimodal_projector_bias=True
    )
    return load_two_layers(LlavaMultiModalProjector(settings), tensors, "mlp")


def assert_equal(ours_BQD, theirs_BQD: torch.Tensor):
    expected = theirs_BQD.numpy(force=True)
    np.testing.assert_allclose(ours_BQD, expected, atol=1e-6 * np.abs(expected).max())


def test_mlp_equals_llava():
    module, tensors = build(mlp.Config(), (4, 6))
    x_BNC = noise(2, 24, C)
    assert_equal(module(x_BNC).tokens_BQD, llava(tensors)(torch.from_numpy(x_BNC)))


@pytest.mark.parametrize(
    ("grid_HW", "config"),
    [
        ((6, 6), avg_pool.Config(num_queries=9)),
        ((6, 6), avg_pool.Config(num_queries=16)),  # 6 -> 4: bins overlap
        ((5, 7), avg_pool.Config(num_queries=12, shape=(3, 4))),
        ((5, 7), avg_pool.Config(num_queries=35, shape=(5, 7))),
        ((4, 6), avg_pool.Config(num_queries=1)),
    ],
)
def test_avg_pool_equals_adaptive_pooling_before_llava(grid_HW, config):
    module, tensors = build(config, grid_HW)
    x_BNC = noise(2, grid_HW[0] * grid_HW[1], C)
    grid_BCHW = torch.from_numpy(x_BNC).mT.reshape(2, C, *grid_HW)
    pooled_BCQ = torch.nn.functional.adaptive_avg_pool2d(grid_BCHW, module.pooled).flatten(2)
    assert_equal(module(x_BNC).tokens_BQD, llava(tensors)(pooled_BCQ.mT))


def test_avg_pool_averages_the_valid_tokens_of_each_bin():
    module, tensors = build(avg_pool.Config(num_queries=4), (4, 4))
    x_BNC = noise(1, 16, C)
    valid_HW = np.ones((4, 4), bool)
    valid_HW[:, 3] = False  # half of the right bins
    valid_HW[2:, 2] = False  # and all of the lower right one
    out = module(x_BNC, Context(valid_HW.reshape(1, 16)))
    np.testing.assert_array_equal(out.valid_BQ, [[True, True, True, False]])
    grid_HWC = x_BNC.reshape(4, 4, C)
    means_QC = np.stack([grid_HWC[:2, :2].mean((0, 1)), grid_HWC[:2, 2].mean(0), grid_HWC[2:, :2].mean((0, 1))])
    assert_equal(out.tokens_BQD[0, :3], llava(tensors)(torch.from_numpy(means_QC)))


@pytest.mark.parametrize(("side", "factor"), [(6, 2), (6, 3), (4, 1)])
def test_pixel_shuffle_equals_idefics3(side, factor):
    module, tensors = build(pixel_shuffle.Config(num_queries=(side // factor) ** 2), (side, side))
    twin = Idefics3Connector(SimpleNamespace(**SIZES, scale_factor=factor))
    twin.load_state_dict({"modality_projection.proj.weight": tensors["head/kernel"]})
    x_BNC = noise(2, side * side, C)
    assert_equal(module(x_BNC).tokens_BQD, twin(torch.from_numpy(x_BNC)))


@pytest.mark.parametrize("grid_HW", [(4, 4), (4, 6)])
def test_pixel_shuffle_mlp_equals_internvl(grid_HW):
    H, W = grid_HW
    module, tensors = build(pixel_shuffle.Config(num_queries=H * W // 4, head="mlp"), grid_HW)
    twin = InternVLMultiModalProjector(SimpleNamespace(**SIZES, downsample_ratio=0.5, projector_hidden_act="gelu"))
    load_two_layers(twin, tensors, "head", {"layer_norm.weight": "norm/scale", "layer_norm.bias": "norm/bias"})
    x_BNC = noise(2, H * W, C)
    shuffled = InternVLModel.pixel_shuffle(None, torch.from_numpy(x_BNC).reshape(2, H, W, C), scale_factor=0.5)
    assert_equal(module(x_BNC).tokens_BQD, twin(shuffled.reshape(2, H * W // 4, 4 * C)))


def test_pixel_shuffle_fills_invalid_tokens_with_zero():
    module, _ = build(pixel_shuffle.Config(num_queries=4), (4, 4))
    x_BNC = noise(1, 16, C)
    valid_HW = np.ones((4, 4), bool)
    valid_HW[:, 3] = False
    valid_HW[2:, 2] = False
    out = module(x_BNC, Context(valid_HW.reshape(1, 16)))
    np.testing.assert_array_equal(out.valid_BQ, [[True, True, True, False]])
    zeroed = module(x_BNC * valid_HW.reshape(1, 16, 1))
    np.testing.assert_array_equal(out.tokens_BQD[0, :3], zeroed.tokens_BQD[0, :3])
