"""The D-Abstractor against Honeybee's own, and against transformers' decoder where Honeybee's cannot go.

golden/d_abstractor.safetensors holds weights, inputs and outputs of kakaobrain/honeybee 68a8d84, class DAbstractor, run
with transformers 4.38.1 in float32 on a CPU (its cast to a CUDA tensor made a CPU one): square grids without masks.
"start" has weights as at Honeybee's start, N(0, 0.02). transformers' DeformableDetrDecoder takes any grid and a mask.
"""

import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    MultiScaleDeformableAttention,
)

from tcjax.compressors import d_abstractor
from tcjax.compressors.base import Widths
from tcjax.export.torch import d_abstractor as room
from tcjax.interop import names
from tests.honeybee import golden, original, same_weights
from tests.planted import leaves, noise, planted
from tests.torch_layers import compress, loaded, off, twin

GOLDEN = golden("d_abstractor")
TINY = {"num_queries": 9, "width": 16, "depth": 2, "heads": 2, "points": 2, "feed_forward": 12}
CASES = {  # name: (side of the grid, config)
    "query": (4, d_abstractor.Config(num_queries=4, width=16, depth=3, heads=4, points=3, feed_forward=20)),
    "tgt": (6, d_abstractor.Config(**TINY | {"num_queries": 16, "points": 4}, pooled_v_target="tgt")),
    "none": (5, d_abstractor.Config(**TINY | {"width": 24, "heads": 3, "feed_forward": 16}, pooled_v_target="none")),
    "start": (5, d_abstractor.Config(**TINY)),
}


def case_of(name: str):
    side, config = CASES[name]
    return config, original(GOLDEN, name, (side, side))


# Honeybee itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equals_honeybee(case):
    config, one = case_of(case)
    start = config.build(one.widths, nnx.Rngs(0)).reference_points[...]
    np.testing.assert_allclose(start, GOLDEN[f"{case}/start"][0], atol=1e-7)
    module = loaded(config, one.widths, one.weights)
    assert off(compress(module, one.x_BNC).tokens_BQD, one.y_BQD) < 5e-6
    same_weights(module, config, one)


@pytest.mark.parametrize("case", CASES)
def test_the_twin_takes_honeybees_weights_as_they_are(case):
    config, one = case_of(case)
    theirs = twin(room, config, one.widths, one.weights)
    assert off(theirs(torch.from_numpy(one.x_BNC)).detach(), one.y_BQD) < 5e-6


def test_another_eps_would_show(monkeypatch):
    monkeypatch.setattr(d_abstractor, "_EPS", 1e-6)
    config, one = case_of("start")
    module = loaded(config, one.widths, one.weights)
    assert off(compress(module, one.x_BNC).tokens_BQD, one.y_BQD) > 2e-5


def test_has_as_many_parameters_as_honeybees():
    """Counted on the original, 1024 to 4096 wide: 55.6 M, of them 51.0 M in the six layers."""
    config, widths = d_abstractor.Config(), Widths(grid_HW=(16, 16), vision_C=1024, llm_D=4096)
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    sizes = {path: leaf.get_value().size for path, leaf in leaves(module).items()}
    assert sum(sizes.values()) == 55_616_352
    assert sum(size for path, size in sizes.items() if path.startswith("layers/")) == 51_008_064
    assert {name.jax for name in config.names(widths)} == sizes.keys()
    assert config.outputs(widths) == 144


def test_starts_as_honeybee_does():
    """Everything N(0, 0.02) and biases 0: its last initialisation runs over Deformable DETR's ring of offsets."""
    config = d_abstractor.Config(num_queries=16, width=64, depth=2, heads=4, feed_forward=96)
    module = config.build(Widths(grid_HW=(8, 8), vision_C=48, llm_D=32), nnx.Rngs(0))
    for path, leaf in leaves(module).items():
        value = np.asarray(leaf.get_value())
        if path.endswith("scale"):
            assert (value == 1).all(), path
        elif path.endswith("bias"):
            assert (value == 0).all(), path
        elif path != "reference_points":
            np.testing.assert_allclose(value.std(), 0.02, rtol=4 / value.size**0.5, err_msg=path)
    kernel_LEI = module.layers.offsets.kernel[...]
    assert not np.array_equal(kernel_LEI[0], kernel_LEI[1])


# transformers' decoder: any grid, masks ------------------------------------------------------------------------------

RENAMED = {"self_attn.out_proj": "self_attn.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}  # since transformers 5


def decoder(config) -> DeformableDetrDecoder:
    settings = DeformableDetrConfig(
        d_model=config.width,
        decoder_layers=config.depth,
        decoder_attention_heads=config.heads,
        decoder_n_points=config.points,
        decoder_ffn_dim=config.feed_forward,
        num_feature_levels=1,
        disable_custom_kernels=True,
    )
    return DeformableDetrDecoder(settings).eval()


def beside_theirs(config, widths):
    """The module, its published tensors, and transformers' decoder with the same weights."""
    module = planted(config, widths)
    points = module.reference_points
    points.set_value(points[...] * 0.4 + 0.5)  # some beyond the border
    weights = {
        key: torch.from_numpy(value)
        for key, value in names.to_torch(names.flatten(module), config.names(widths)).items()
    }
    theirs, layers = decoder(config), {key: value for key, value in weights.items() if key.startswith("layers.")}
    for old, new in RENAMED.items():
        layers = {key.replace(f".{old}.", f".{new}."): value for key, value in layers.items()}
    theirs.load_state_dict(layers)
    return module, weights, theirs


def bin_means(v: np.ndarray, valid_BN: np.ndarray, grid_HW, pooled) -> np.ndarray:
    """Bin by bin: the mean of the valid tokens, 0 if there are none."""
    (H, W), (height, width) = grid_HW, pooled
    means = []
    for b in range(len(v)):
        grid, valid = v[b].reshape(H, W, -1), valid_BN[b].reshape(H, W)
        for i in range(height):
            for j in range(width):
                rows = slice(i * H // height, -(-(i + 1) * H // height))
                columns = slice(j * W // width, -(-(j + 1) * W // width))
                inside = grid[rows, columns][valid[rows, columns]]
                means.append(inside.mean(0) if len(inside) else np.zeros(grid.shape[-1], np.float32))
    return np.stack(means).reshape(len(v), height * width, -1)


def oracle(config, widths, weights, theirs, x_BNC, valid_BN):
    """Projection, positions and pooling by hand, then transformers' decoder."""
    v = torch.from_numpy(x_BNC)
    if "input_proj.0.weight" in weights:
        v = functional.linear(v, weights["input_proj.0.weight"], weights["input_proj.0.bias"])
    v = v + weights["v_pos_emb"] if config.pos_emb else v
    mask = None if valid_BN is None else torch.from_numpy(valid_BN)
    everything = np.ones(x_BNC.shape[:2], bool) if valid_BN is None else valid_BN
    pooled = torch.from_numpy(bin_means(v.numpy(), everything, widths.grid_HW, config.out_grid(widths)))
    learned = weights["query_position_embeddings.weight"].expand(len(x_BNC), -1, -1)
    position, content = {"query": (pooled, learned), "tgt": (learned, pooled)}[config.pooled_v_target]
    shapes = [widths.grid_HW]
    with torch.no_grad():
        out = theirs(
            inputs_embeds=content,
            encoder_hidden_states=v,
            encoder_attention_mask=mask,
            object_queries_position_embeddings=position,
            reference_points=weights["reference_points"].expand(len(x_BNC), -1, -1),
            spatial_shapes=torch.tensor(shapes),
            spatial_shapes_list=shapes,
            level_start_index=torch.tensor([0]),
            valid_ratios=torch.ones(len(x_BNC), 1, 2),
        ).last_hidden_state
        if "output_proj.weight" in weights:
            out = functional.linear(out, weights["output_proj.weight"], weights["output_proj.bias"])
    return out.numpy()


SHAPES = {  # name: (grid, pooled, C, config's own)
    "rectangle": ((4, 6), (2, 3), 12, {}),
    "odd": ((5, 3), (3, 3), 12, {"pooled_v_target": "tgt", "depth": 3}),
    "one wide row": ((3, 7), (1, 5), 16, {"pos_emb": False, "heads": 4}),
    "27 x 27": ((27, 27), (12, 12), 6, {"points": 4, "width": 8, "depth": 1}),
}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_transformers_decoder(name, ragged):
    grid_HW, pooled, C, own = SHAPES[name]
    config = d_abstractor.Config(**TINY | {"num_queries": pooled[0] * pooled[1], "shape": pooled} | own)
    widths = Widths(grid_HW=grid_HW, vision_C=C, llm_D=10)
    module, weights, theirs = beside_theirs(config, widths)
    N = widths.num_tokens
    x_BNC, valid_BN = noise(2, N, C), None
    if ragged:
        valid_BN = np.random.RandomState(1).random_sample((2, N)) < 0.6
        valid_BN[1] &= np.arange(N) < N // 2
        x_BNC = np.where(valid_BN[..., None], x_BNC, 0).astype(np.float32)
    expected_BQD = oracle(config, widths, weights, theirs, x_BNC, valid_BN)
    assert off(compress(module, x_BNC, valid_BN=valid_BN).tokens_BQD, expected_BQD) < 1e-5


def test_reference_points_are_the_centres_of_the_first_and_the_last_tokens():
    """Of a 4 x 6 grid at 2 x 3 queries, (x, y): from 0.5 to 5.5 of 6 columns, from 0.5 to 3.5 of 4 rows."""
    config = d_abstractor.Config(**TINY | {"num_queries": 6, "shape": (2, 3)})
    points = config.build(Widths(grid_HW=(4, 6), vision_C=8, llm_D=8), nnx.Rngs(0)).reference_points[...]
    expected = [[x / 6, y / 4] for y in (0.5, 3.5) for x in (0.5, 3.0, 5.5)]
    np.testing.assert_allclose(points, expected, atol=1e-7)


def test_the_ring_is_deformable_detrs():
    """Its own offsets; attention weights start at 0, values and their output Xavier-uniform."""
    config = d_abstractor.Config(**TINY | {"heads": 8, "points": 4, "width": 32, "ring_init": True})
    module = config.build(Widths(grid_HW=(4, 4), vision_C=32, llm_D=32), nnx.Rngs(0))
    start = names.to_torch(names.flatten(module), config.names(Widths(grid_HW=(4, 4), vision_C=32, llm_D=32)))
    theirs = decoder(config).state_dict()
    for layer in ("layers.0.encoder_attn.", "layers.1.encoder_attn."):
        for key in ("sampling_offsets.weight", "sampling_offsets.bias", "attention_weights.weight"):
            np.testing.assert_allclose(start[layer + key], theirs[layer + key].numpy(), atol=5e-6)
        for key in ("value_proj", "output_proj"):
            values, bound = start[f"{layer}{key}.weight"], theirs[f"{layer}{key}.weight"].abs().max().item()
            np.testing.assert_allclose(np.abs(values).max(), bound, rtol=0.02)
            np.testing.assert_allclose(values.std(), (6 / 64) ** 0.5 / 3**0.5, rtol=0.1)
    assert np.abs(start["layers.0.encoder_attn.sampling_offsets.bias"]).max() == 4  # tokens, with its fourth point


def test_bilinear_weights_are_grid_samples_derivatives_included():
    """Inside, across the border, outside, and on whole places, where the derivative is towards the next cell."""
    place_S = np.array([0.0, 2.0, 3.0, 7.0, 1.25, -0.25, -1.0, -1.5, 7.75, 8.0, 9.5], np.float32)
    value_W = noise(8)  # 8: torch's way through -1 ... 1 is then exact
    theirs = torch.tensor((2 * (place_S + 0.5) / 8 - 1), dtype=torch.float64, requires_grad=True)
    grid = torch.stack([theirs, torch.zeros_like(theirs)], -1)[None, None]
    sampled = functional.grid_sample(torch.from_numpy(value_W).double()[None, None, None], grid, align_corners=False)
    sampled.sum().backward()

    def sample(place_S):
        return (d_abstractor._bilinear(place_S, 8) * value_W).sum(-1)

    ours, pull = nnx.jit(lambda place_S: (sample(place_S), nnx.grad(lambda p: sample(p).sum())(place_S)))(place_S)
    np.testing.assert_allclose(ours, sampled.detach().flatten(), atol=1e-6)
    np.testing.assert_allclose(pull, theirs.grad * 2 / 8, atol=1e-5)


def test_assignment_is_where_the_last_layer_looked():
    """transformers' own sampling of unit vectors in place of values gives the weight of every token."""
    config = d_abstractor.Config(**TINY | {"num_queries": 6, "shape": (2, 3)})
    widths = Widths(grid_HW=(4, 6), vision_C=12, llm_D=10)
    module, weights, theirs = beside_theirs(config, widths)
    caught = {}
    sampling = theirs.layers[-1].encoder_attn.attn
    sampling.register_forward_pre_hook(lambda _, args: caught.update(args=args))
    x_BNC = noise(2, 24, 12)
    oracle(config, widths, weights, theirs, x_BNC, None)
    units = torch.eye(24).expand(2, 2, -1, -1).transpose(1, 2)  # [B, N, heads, N]
    looked = MultiScaleDeformableAttention()(units, *caught["args"][1:]).unflatten(-1, (2, 24)).mean(2)
    assign_BQN = compress(module, x_BNC).assign_BQN
    np.testing.assert_allclose(assign_BQN, looked / looked.sum(-1, keepdim=True), atol=1e-5)


def test_a_query_that_looks_outside_shares_itself_out_equally():
    config = d_abstractor.Config(**TINY | {"num_queries": 4})
    module = planted(config, Widths(grid_HW=(4, 6), vision_C=12, llm_D=10))
    module.reference_points.set_value(module.reference_points[...] * 0 + 9)
    valid_BN = np.arange(24)[None] < 10
    np.testing.assert_allclose(
        compress(module, noise(1, 24, 12), valid_BN=valid_BN).assign_BQN[0, :, :10], 0.1, atol=1e-6
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (d_abstractor.Config(num_queries=7, shape=(1, 7)), r"shape=\(1, 7\) .* \(1, 1\) to \(4, 6\)"),
        (d_abstractor.Config(num_queries=4, points=0), "points=0: must be at least 1"),
        (d_abstractor.Config(num_queries=4, heads=6), "heads=6 must divide width=1024"),
    ],
)
def test_impossible_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(Widths(grid_HW=(4, 6), vision_C=12, llm_D=16), nnx.Rngs(0))
    with pytest.raises(ValueError, match="wrap it in per_frame"):
        d_abstractor.Config().outputs(Widths(grid_HW=(16, 16), vision_C=12, llm_D=16, frames=2))
