"""The pooling compressors against torch's own poolings and the published projectors in transformers."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector

from tcjax.compressors import avg_pool, gemma3_pool, matryoshka_pool, max_pool, staged_pool
from tcjax.compressors.base import Context, Widths
from tests.planted import leaves, noise
from tests.test_projector_parity import SIZES, C, D, assert_equal, build, llava

GRIDS = [  # grid, num_queries, shape
    ((6, 6), 9, None),
    ((6, 6), 16, None),  # bins overlap
    ((5, 7), 12, (3, 4)),
    ((27, 27), 81, None),
    ((27, 27), 100, None),
    ((4, 6), 1, None),
    ((3, 5), 15, (3, 5)),  # nothing to pool
]
VALID_HW = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], bool)  # an empty bin of 2 x 2, a half one


@nnx.jit
def compress(module, x_BNC, valid_BN=None, active_B=None):
    return module(x_BNC, Context(valid_BN, assign=True, active_B=active_B))


def grid_of(x_BNC, grid_HW) -> torch.Tensor:
    return torch.from_numpy(x_BNC).mT.reshape(len(x_BNC), -1, *grid_HW)


def rows_of(grid_BCHW: torch.Tensor) -> torch.Tensor:
    return grid_BCHW.flatten(2).mT


def noisy(grid_HW, width=C):
    return 2 * noise(2, grid_HW[0] * grid_HW[1], width) - 1


# Average -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "ratio"), [(6, 2), (6, 3), (8, 2)])
def test_avg_pool_after_the_mlp_equals_perception_lm(side, ratio):
    config = avg_pool.Config(num_queries=(side // ratio) ** 2, order="mlp, then pool")
    module, tensors = build(config, (side, side))
    settings = SimpleNamespace(
        vision_config=SimpleNamespace(model_args={"embed_dim": C}),
        text_config=SIZES["text_config"],
        projector_pooling_ratio=ratio,
    )
    twin = PerceptionLMMultiModalProjector(settings)
    twin.load_state_dict(llava(tensors).state_dict())
    x_BNC = noisy((side, side))
    assert_equal(compress(module, x_BNC).tokens_BQD, twin(torch.from_numpy(x_BNC)))


@pytest.mark.parametrize(("grid_HW", "num_queries", "shape"), GRIDS)
def test_avg_pool_after_the_mlp_equals_adaptive_pooling(grid_HW, num_queries, shape):
    module, tensors = build(avg_pool.Config(num_queries=num_queries, shape=shape, order="mlp, then pool"), grid_HW)
    x_BNC = noisy(grid_HW)
    projected = grid_of(llava(tensors)(torch.from_numpy(x_BNC)).numpy(force=True), grid_HW)
    assert_equal(compress(module, x_BNC).tokens_BQD, rows_of(functional.adaptive_avg_pool2d(projected, module.pooled)))


def test_avg_pool_after_the_mlp_leaves_the_bias_of_padding_out():
    module, tensors = build(avg_pool.Config(num_queries=4, order="mlp, then pool"), (4, 4))
    x_BNC = noise(1, 16, C)
    out = compress(module, x_BNC, VALID_HW.reshape(1, 16))
    np.testing.assert_array_equal(out.valid_BQ, [[True, True, True, False]])
    projected_HWD = llava(tensors)(torch.from_numpy(x_BNC))[0].reshape(4, 4, D)
    assert_equal(out.tokens_BQD[0, 1], projected_HWD[:2, 2].mean(0))


@pytest.mark.parametrize("family", [avg_pool, max_pool])
@pytest.mark.parametrize("order", ["pool, then mlp", "mlp, then pool"])
def test_without_layers_a_pool_only_pools(family, order):
    widths = Widths(grid_HW=(6, 6), vision_C=C, llm_D=C)
    module = family.Config(num_queries=9, depth=0, order=order).build(widths, nnx.Rngs(0))
    assert not leaves(module)
    x_BNC = noisy((6, 6))
    mode = "average" if family is avg_pool else "max"
    settings = SimpleNamespace(
        spatial_pool_mode=mode,
        spatial_pool_stride=2,
        vision_config=SimpleNamespace(hidden_size=C, image_size=6, patch_size=1),
    )
    assert_equal(compress(module, x_BNC).tokens_BQD, LlavaNextVideoPooler(settings)(torch.from_numpy(x_BNC)))
    assert module(jnp.asarray(x_BNC, jnp.bfloat16)).tokens_BQD.dtype == jnp.bfloat16


# Maximum -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pool, then mlp", "mlp, then pool"])
@pytest.mark.parametrize(("grid_HW", "num_queries", "shape"), GRIDS)
def test_max_pool_equals_adaptive_pooling(grid_HW, num_queries, shape, order):
    module, tensors = build(max_pool.Config(num_queries=num_queries, shape=shape, order=order), grid_HW)
    x_BNC, project = noisy(grid_HW), llava(tensors)
    if order == "pool, then mlp":
        theirs = project(rows_of(functional.adaptive_max_pool2d(grid_of(x_BNC, grid_HW), module.pooled)))
    else:
        projected = grid_of(project(torch.from_numpy(x_BNC)).numpy(force=True), grid_HW)
        theirs = rows_of(functional.adaptive_max_pool2d(projected, module.pooled))
    assert_equal(compress(module, x_BNC).tokens_BQD, theirs)


@pytest.mark.parametrize("num_queries", [4, 9])  # whole windows, and overlapping bins
def test_padding_never_wins_a_maximum(num_queries):
    """All tokens are negative: a zero in place of an invalid one would be the maximum."""
    module, tensors = build(max_pool.Config(num_queries=num_queries), (4, 4))
    x_BNC = -1 - np.abs(noise(1, 16, C))
    out = compress(module, x_BNC, VALID_HW.reshape(1, 16))
    torch_grid = grid_of(np.where(VALID_HW.reshape(16, 1), x_BNC, -np.inf), (4, 4))
    most_QC = rows_of(functional.adaptive_max_pool2d(torch_grid, module.pooled))[0]
    some_Q = torch.isfinite(most_QC).all(-1)
    assert not some_Q.all()
    np.testing.assert_array_equal(out.valid_BQ[0], some_Q)
    assert_equal(out.tokens_BQD[0][some_Q.numpy()], llava(tensors)(most_QC[some_Q]))
    np.testing.assert_array_equal(np.asarray(out.assign_BQN)[0][:, ~VALID_HW.reshape(16)], 0)


def test_the_share_of_a_token_is_the_channels_it_won():
    module, _ = build(max_pool.Config(num_queries=1), (2, 2))
    x_BNC = np.zeros((1, 4, C), np.float32)
    x_BNC[0, 0, :6], x_BNC[0, 1, 6:10], x_BNC[0, 3, 10:] = 1, 2, 3
    shares = compress(module, x_BNC).assign_BQN[0, 0]
    np.testing.assert_allclose(shares, np.array([6, 4, 0, 2]) / 12, atol=1e-6)


# Gemma 3 -------------------------------------------------------------------------------------------------------------


def gemma(vision, text, side, num_queries):
    settings = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=vision, layer_norm_eps=1e-6, image_size=14 * side, patch_size=14),
        text_config=SimpleNamespace(hidden_size=text),
        mm_tokens_per_image=num_queries,
    )
    return Gemma3MultiModalProjector(settings)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 an eps of 1e-5 would show
@pytest.mark.parametrize(("side", "num_queries"), [(8, 16), (6, 9), (6, 4), (27, 81)])
def test_gemma3_pool_equals_gemma3(side, num_queries, scale):
    module, tensors = build(gemma3_pool.Config(num_queries=num_queries), (side, side))
    twin = gemma(C, D, side, num_queries)
    twin.load_state_dict(
        {
            "mm_input_projection_weight": tensors["projection/kernel"].T,  # `build` transposes
            "mm_soft_emb_norm.weight": tensors["norm/scale"],
        }
    )
    x_BNC = scale * noisy((side, side))
    assert_equal(compress(module, x_BNC).tokens_BQD, twin(torch.from_numpy(x_BNC)))


def test_gemma3_pool_reads_rectangles_and_averages_what_is_valid():
    module, tensors = build(gemma3_pool.Config(num_queries=6), (4, 6))
    x_BNC, valid_HW = noise(1, 24, C), np.ones((4, 6), bool)
    valid_HW[:, 3:], valid_HW[2:, 2] = False, False
    out = compress(module, x_BNC, valid_HW.reshape(1, 24))
    np.testing.assert_array_equal(out.valid_BQ, [[True, True, False, True, False, False]])
    mean_C = torch.from_numpy(x_BNC[0].reshape(4, 6, C)[:2, 2].mean(0))
    unit_C = mean_C / (mean_C.square().mean() + 1e-6).sqrt() * (1 + tensors["norm/scale"])
    assert_equal(out.tokens_BQD[0, 1], unit_C @ tensors["projection/kernel"].T)


def test_gemma3_pool_has_the_published_size_and_starts_as_it_says():
    config, widths = gemma3_pool.Config(), Widths(grid_HW=(64, 64), vision_C=1152, llm_D=2560)  # Gemma 3 4B
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    with torch.device("meta"):
        published = sum(weight.numel() for weight in gemma(1152, 2560, 64, 256).parameters())
    assert sum(leaf.get_value().size for leaf in leaves(module).values()) == published
    assert config.outputs(widths) == 256
    start = leaves(gemma3_pool.Config(num_queries=4).build(Widths(grid_HW=(4, 4), vision_C=64, llm_D=96), nnx.Rngs(0)))
    assert not np.asarray(start["norm/scale"].get_value()).any()
    np.testing.assert_allclose(np.asarray(start["projection/kernel"].get_value()).std(), 64**-0.5, rtol=0.05)


# Matryoshka ----------------------------------------------------------------------------------------------------------


def published_m3(tensors, x_BNC, scale):
    """The projector, then the average of whole blocks, the kernel rounded down as the original does."""
    side = int(x_BNC.shape[1] ** 0.5)
    projected = grid_of(llava(tensors)(torch.from_numpy(x_BNC)).numpy(force=True), (side, side))
    kernel = int(np.sqrt(x_BNC.shape[1] / scale))
    return rows_of(functional.avg_pool2d(projected, kernel, kernel))


@pytest.mark.parametrize("scale", [1, 9, 36, 144, 576])
def test_every_published_scale_is_the_average_after_the_projector(scale):
    module, tensors = build(matryoshka_pool.Config(), (24, 24))
    x_BNC = noisy((24, 24))
    theirs = published_m3(tensors, x_BNC, scale)
    assert theirs.shape[1] == scale
    out = compress(module, x_BNC, active_B=jnp.full(2, scale))
    assert_equal(out.tokens_BQD[:, :scale], theirs)
    np.testing.assert_array_equal(out.tokens_BQD[:, scale:], 0)
    np.testing.assert_array_equal(out.valid_BQ.sum(1), scale)
    alone, _ = build(matryoshka_pool.Config().at(scale), (24, 24))
    assert_equal(compress(alone, x_BNC).tokens_BQD, theirs)


def test_every_row_of_a_batch_has_its_own_scale():
    """Between two scales it is the smaller, below the smallest none."""
    module, tensors = build(matryoshka_pool.Config(num_queries=36, scales=(4, 9, 36)), (6, 6))
    x_BNC = noise(6, 36, C)
    out = compress(module, x_BNC, active_B=jnp.asarray([36, 9, 4, 35, 8, 3]))
    for row, scale in enumerate([36, 9, 4, 9, 4]):
        assert_equal(out.tokens_BQD[row, :scale], published_m3(tensors, x_BNC[row : row + 1], scale)[0])
        assert not np.asarray(out.tokens_BQD[row, scale:]).any()
        np.testing.assert_array_equal(out.valid_BQ[row], np.arange(36) < scale)
        np.testing.assert_allclose(out.assign_BQN[row].sum(-1), np.arange(36) < scale, atol=1e-6)
    assert not out.valid_BQ[5].any()
    assert not np.asarray(out.tokens_BQD[5]).any()


def test_a_scale_that_is_no_whole_pooling_is_refused():
    """The original's kernel for 100 tokens is int(2.4) = 2, which gives 144."""
    widths = Widths(grid_HW=(24, 24), vision_C=C, llm_D=D)
    _, tensors = build(matryoshka_pool.Config(), (24, 24))
    assert published_m3(tensors, noise(1, 576, C), 100).shape[1] == 144
    with pytest.raises(ValueError, match=r"num_queries=100 is not a whole .*144, 576\]"):
        matryoshka_pool.Config(scales=(1, 100, 576)).outputs(widths)
    with pytest.raises(ValueError, match=r"num_queries=100 is none of the scales"):
        matryoshka_pool.Config().at(100).outputs(widths)


@pytest.mark.parametrize(
    ("num_queries", "scales"),
    [(576, (1, 9, 36, 144, 576)), (64, (1, 4, 16, 64)), (729, (1, 9, 81, 729)), (6, (1, 6)), (24, (1, 6, 24))],
)
def test_the_scales_are_the_published_ones_where_nothing_is_said(num_queries, scales):
    config = matryoshka_pool.Config(num_queries=num_queries)
    assert config.averaged_over() == scales
    assert config.at(scales[-2]).averaged_over() == scales[:-1]
    assert config.at(scales[-2]).at(num_queries).trained() == scales


# Stages --------------------------------------------------------------------------------------------------------------


def published_stages(tensors, config, widths, x_BNC, valid_BN=None):
    """AdaptiveAvgPool2d and transformers' ConvNextLayer in turn; masks by hand."""
    grid = grid_of(x_BNC, widths.grid_HW)
    some = torch.ones_like(grid[:, :1]) if valid_BN is None else grid_of(valid_BN[..., None], widths.grid_HW).float()
    settings = SimpleNamespace(hidden_act="gelu", layer_scale_init_value=1e-6)
    grids = config.grids(widths)
    for i, shape in enumerate(grids):
        share = functional.adaptive_avg_pool2d(some, shape)
        grid = functional.adaptive_avg_pool2d(grid * some, shape) / share.clamp(min=1e-9)
        some = (share > 0).float()
        if i == len(grids) - 1:
            break
        layer = ConvNextLayer(settings, C)
        own = {path.split("/", 2)[2]: tensor for path, tensor in tensors.items() if path.startswith(f"blocks/{i}/")}
        layer.dwconv = torch.nn.Conv2d(C, C, config.kernel, padding="same", groups=C)
        layer.load_state_dict(
            {
                "layer_scale_parameter": own["layer_scale"],
                "dwconv.weight": own["conv/kernel"].permute(0, 1, 3, 2),  # `build` reverses all axes
                "dwconv.bias": own["conv/bias"],
                "layernorm.weight": own["norm/scale"],
                "layernorm.bias": own["norm/bias"],
            }
            | {
                f"{theirs}.{name}": own[f"{ours}/{leaf}"]
                for theirs, ours in (("pwconv1", "ff_in"), ("pwconv2", "ff_out"))
                for name, leaf in (("weight", "kernel"), ("bias", "bias"))
            }
        )
        grid = layer.eval()(grid) * some
    return llava(tensors)(rows_of(grid)), rows_of(some)[..., 0] > 0


STAGED = {
    "default": ((16, 16), staged_pool.Config(num_queries=36)),
    "three halvings": ((8, 8), staged_pool.Config(num_queries=8, shapes=((8, 4), (4, 4), (4, 2)))),
    "rectangle": ((5, 9), staged_pool.Config(num_queries=4, stages=2, kernel=5)),
    "27": ((27, 27), staged_pool.Config(num_queries=49, kernel=3)),
    "one stage": ((6, 6), staged_pool.Config(num_queries=16, stages=1)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", STAGED)
def test_staged_pool_equals_poolings_and_convnext_layers(name, masked):
    grid_HW, config = STAGED[name]
    module, tensors = build(config, grid_HW)
    if name == "default":
        assert module.grids == ((12, 12), (8, 8), (6, 6))
    x_BNC, valid_BN = noisy(grid_HW), None
    if masked:
        valid_HW = np.ones(grid_HW, bool)
        valid_HW[:, -grid_HW[1] // 2 :], valid_HW[0] = False, False
        valid_BN = np.stack([valid_HW.reshape(-1), np.ones(valid_HW.size, bool)])
    out = compress(module, x_BNC, valid_BN)
    theirs, some = published_stages(tensors, config, module.widths, x_BNC, valid_BN)
    if masked:
        np.testing.assert_array_equal(out.valid_BQ, some)
        assert not some.all()
    some = some.numpy()
    assert_equal(np.asarray(out.tokens_BQD)[some], theirs[torch.from_numpy(some)])
    np.testing.assert_allclose(out.assign_BQN.sum(-1), some, atol=1e-6)


def test_staged_pool_starts_as_a_pooling_of_poolings():
    grid_HW, config = STAGED["three halvings"]
    module = config.build(Widths(grid_HW=grid_HW, vision_C=C, llm_D=D), nnx.Rngs(0))
    start = {path: np.asarray(leaf.get_value()) for path, leaf in leaves(module).items()}
    tensors = {path: torch.from_numpy(value.T.copy()) for path, value in start.items() if path.startswith("mlp")}
    x_BNC = noise(2, 64, C)
    pooled = rows_of(functional.adaptive_avg_pool2d(grid_of(x_BNC, grid_HW), (4, 2)))
    theirs_BQD = llava(tensors)(pooled).numpy(force=True)
    np.testing.assert_allclose(compress(module, x_BNC).tokens_BQD, theirs_BQD, atol=1e-5)
    assert set(start["blocks/0/layer_scale"]) == {np.float32(1e-6)}
    for path in ("conv/kernel", "ff_in/kernel", "ff_out/kernel"):
        np.testing.assert_allclose(start[f"blocks/1/{path}"].std(), 0.02, rtol=0.1)
        assert not np.array_equal(start[f"blocks/0/{path}"], start[f"blocks/1/{path}"])
    assert not start["blocks/0/ff_in/bias"].any()
