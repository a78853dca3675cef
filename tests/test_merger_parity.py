"""The learned mergers against their published modules in transformers, and the orders that shapes do not show."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from tcjax.compressors import patch_merger, pixel_shuffle
from tcjax.compressors.base import Context, Widths
from tests.planted import leaves, noise
from tests.test_projector_parity import SIZES, C, D, assert_equal, build, load_two_layers

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_deepstack"]
GRIDS = [((4, 4), 2), ((4, 6), 2), ((6, 2), 2), ((6, 9), 3), ((27, 27), 3), ((3, 5), 1)]


@nnx.jit
def compress(module, x_BNC, valid_BN=None):
    return module(x_BNC, Context(valid_BN, assign=True))


def qwen(form, vision, text, factor=2):
    if form in ("qwen2_vl", "qwen2_5_vl"):
        return {"qwen2_vl": PatchMerger, "qwen2_5_vl": Qwen2_5_VLPatchMerger}[form](text, vision, factor)
    settings = SimpleNamespace(hidden_size=vision, spatial_merge_size=factor, out_hidden_size=text)
    return Qwen3VLVisionPatchMerger(settings, use_postshuffle_norm=form == "qwen3_vl_deepstack")


def mistral(vision, text, factor=2):
    settings = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=vision, patch_size=14),
        text_config=SimpleNamespace(hidden_size=text, rms_norm_eps=1e-5),
        spatial_merge_size=factor,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
    )
    return Mistral3MultiModalProjector(settings)


def load(twin, config, module, tensors):
    """By the table of names, which is what an export writes."""
    table = config.names(module.widths)
    twin.load_state_dict({line.torch: tensors[line.jax] for line in table}, strict=True)
    return twin


def consecutive(x_BNC, grid_HW, s):
    """The tokens in the order of Qwen's processor: block by block, "(h s) (w s)" within."""
    H, W = grid_HW
    return torch.from_numpy(
        x_BNC.reshape(len(x_BNC), H // s, s, W // s, s, -1).swapaxes(2, 3).reshape(x_BNC.shape).copy()
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 another eps shows
@pytest.mark.parametrize(("grid_HW", "factor"), GRIDS)
@pytest.mark.parametrize("form", QWEN)
def test_qwens_mergers_are_computed(form, grid_HW, factor, scale):
    Q = grid_HW[0] * grid_HW[1] // factor**2
    config = patch_merger.Config(num_queries=Q, form=form)
    module, tensors = build(config, grid_HW)
    twin = load(qwen(form, C, D, factor), config, module, tensors)
    x_BNC = scale * (2 * noise(2, grid_HW[0] * grid_HW[1], C) + 1)
    theirs = twin(consecutive(x_BNC, grid_HW, factor).flatten(0, 1)).unflatten(0, (2, Q))
    assert_equal(compress(module, x_BNC).tokens_BQD, theirs)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("grid_HW", "factor"), GRIDS)
def test_mistrals_merger_is_computed(grid_HW, factor, scale):
    (H, W), Q = grid_HW, grid_HW[0] * grid_HW[1] // factor**2
    config = patch_merger.Config(num_queries=Q, form="mistral3")
    module, tensors = build(config, grid_HW)
    twin = load(mistral(C, D, factor), config, module, tensors)
    x_BNC = scale * (2 * noise(2, H * W, C) + 1)
    theirs = twin(torch.from_numpy(x_BNC).flatten(0, 1), torch.tensor([[14 * H, 14 * W]] * 2))
    assert_equal(compress(module, x_BNC).tokens_BQD, theirs.unflatten(0, (2, Q)))


def test_the_channel_order_is_a_permutation_of_the_merging_layer():
    """Equal shapes, other numbers: only rearranged rows make Mistral's merger of one in the other order."""
    config = patch_merger.Config(num_queries=4, form="mistral3")
    module, _ = build(config, (4, 4))
    x_BNC = noise(2, 16, C)
    right_BQD = compress(module, x_BNC).tokens_BQD
    kernel_EC = np.asarray(module.merge.kernel[...])
    module.merge.kernel.set_value(kernel_EC.reshape(C, 4, C).swapaxes(0, 1).reshape(4 * C, C))
    assert np.abs(compress(module, x_BNC).tokens_BQD - right_BQD).max() > 0.1
    grid = torch.nn.functional.pixel_unshuffle(torch.from_numpy(x_BNC).mT.reshape(2, C, 4, 4), 2)
    unit = torch.from_numpy(noise(4 * C, 3, seed=1))
    wide = patch_merger.space_to_depth(x_BNC, (4, 4), 2, channels_first=True)
    np.testing.assert_allclose(wide @ unit.numpy(), (grid.flatten(2).mT @ unit).numpy(), atol=1e-5)


@pytest.mark.parametrize("form", patch_merger.FORMS)
def test_padding_enters_a_wide_token_as_zero_behind_the_norm(form):
    """By hand in torch: normed tokens, zeros where invalid, then the published layers without their norm."""
    config = patch_merger.Config(num_queries=4, form=form)
    module, tensors = build(config, (4, 4))
    twin = load(mistral(C, D) if form == "mistral3" else qwen(form, C, D), config, module, tensors)
    valid_HW = np.ones((4, 4), bool)
    valid_HW[:, 3], valid_HW[2:, 2] = False, False
    x_BNC = noise(1, 16, C)
    out = compress(module, np.where(valid_HW.reshape(1, 16, 1), x_BNC, np.nan), valid_HW.reshape(1, 16))
    np.testing.assert_array_equal(out.valid_BQ, [[True, True, True, False]])
    keep, x = torch.from_numpy(valid_HW).reshape(1, 16, 1), torch.from_numpy(x_BNC)
    name = "ln_q" if hasattr(twin, "ln_q") else "norm"
    if form == "qwen3_vl_deepstack":
        normed = (x * keep).numpy()
    else:
        normed = (twin.get_submodule(name)(x) * keep).numpy(force=True)
        setattr(twin, name, torch.nn.Identity())
    if form == "mistral3":
        theirs = twin(torch.from_numpy(normed)[0], torch.tensor([[56, 56]]))
    else:
        theirs = twin(consecutive(normed, (4, 4), 2)[0])
    assert_equal(out.tokens_BQD[0, :3], theirs[:3])


@pytest.mark.parametrize(("form", "vision", "text"), [*((form, 1280, 3584) for form in QWEN), ("mistral3", 1024, 5120)])
def test_published_sizes(form, vision, text):
    """Qwen2-VL 7B: 44,575,744 parameters; Mistral Small 3.1: 35,652,608."""
    config, widths = (
        patch_merger.Config(num_queries=144, form=form),
        Widths(grid_HW=(24, 24), vision_C=vision, llm_D=text),
    )
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    with torch.device("meta"):
        twin = mistral(vision, text) if form == "mistral3" else qwen(form, vision, text)
    ours = sum(leaf.get_value().size for leaf in leaves(module).values())
    assert ours == sum(weight.numel() for weight in twin.parameters())
    assert ours == {"qwen2_vl": 44_575_744, "mistral3": 35_652_608}.get(form, ours)


@pytest.mark.parametrize("form", patch_merger.FORMS)
def test_starts_as_torch_does(form):
    config = patch_merger.Config(num_queries=4, form=form)
    start = leaves(config.build(Widths(grid_HW=(4, 4), vision_C=32, llm_D=64), nnx.Rngs(0)))
    for path, leaf in start.items():
        value = np.asarray(leaf.get_value())
        if path.endswith("kernel"):
            np.testing.assert_allclose(np.abs(value).max(), len(value) ** -0.5, rtol=0.01)
            np.testing.assert_allclose(value.std(), (3 * len(value)) ** -0.5, rtol=0.05)
        else:
            assert (value == (path == "norm/scale")).all(), path


# Pixel shuffle, column by column -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_HW", [(4, 4), (4, 6), (6, 2)])
def test_internvls_first_version_hands_the_blocks_over_by_columns(grid_HW):
    """Its pixel_shuffle lacks the last swap of transformers', so that swap is undone here."""
    H, W = grid_HW
    config = pixel_shuffle.Config(num_queries=H * W // 4, head="mlp", token_order="column by column")
    module, tensors = build(config, grid_HW)
    twin = InternVLMultiModalProjector(SimpleNamespace(**SIZES, downsample_ratio=0.5, projector_hidden_act="gelu"))
    load_two_layers(twin, tensors, "head", {"layer_norm.weight": "norm/scale", "layer_norm.bias": "norm/bias"})
    x_BNC = noise(2, H * W, C)
    shuffled = InternVLModel.pixel_shuffle(None, torch.from_numpy(x_BNC).reshape(2, H, W, C), scale_factor=0.5)
    theirs = twin(shuffled.permute(0, 2, 1, 3).reshape(2, H * W // 4, 4 * C))
    out = compress(module, x_BNC)
    assert_equal(out.tokens_BQD, theirs)
    by_rows, _ = build(pixel_shuffle.Config(num_queries=H * W // 4, head="mlp"), grid_HW)
    rows = compress(by_rows, x_BNC)
    order = np.arange(H * W // 4).reshape(H // 2, W // 2).T.reshape(-1)
    np.testing.assert_array_equal(out.tokens_BQD, rows.tokens_BQD[:, order])
    np.testing.assert_array_equal(out.assign_BQN, rows.assign_BQN[:, order])
    assert config.out_grid(module.widths) == (1, H * W // 4)
    valid_BN = np.tile(np.arange(H * W) < H * W // 2, (2, 1))
    np.testing.assert_array_equal(
        compress(module, x_BNC, valid_BN).valid_BQ, compress(by_rows, x_BNC, valid_BN).valid_BQ[:, order]
    )
