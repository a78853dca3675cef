"""The vision tower: numbers of the published classes, strict names, one grid order, clear refusals."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from tcjax.config import Pixels
from tcjax.interop import names
from tcjax.towers import layouts, vit
from tcjax.towers.vit import VitConfig

CLIP = VitConfig(
    pixels=Pixels(size_YX=(18, 18)),
    patch=4,  # 18 = 4 * 4 + 2: the last two pixels belong to no patch
    width=24,
    layers=3,
    heads=3,
    feed_forward=32,
    activation="quick_gelu",
    norm_eps=1e-5,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    post_norm=False,
)
SIGLIP = dataclasses.replace(
    CLIP,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    post_norm=True,
)


EVERYTHING = dataclasses.replace(CLIP, patch_bias=True, post_norm=True)


def behind(cfg: VitConfig, feature_layer: int) -> VitConfig:
    return dataclasses.replace(cfg, feature_layer=feature_layer)


CASES = {
    "clip": CLIP,
    "clip-llava": behind(CLIP, -2),
    "siglip": SIGLIP,
    "siglip-earlier": behind(SIGLIP, -3),
}


def twin(cfg: VitConfig) -> torch.nn.Module:
    """The published class at this size, with its text half as on the hub; every tensor random, so that nothing hides
    behind an initial 0 or 1."""
    config_type, model_type = (
        (transformers.CLIPConfig, transformers.CLIPModel)
        if cfg.class_token
        else (transformers.SiglipConfig, transformers.SiglipModel)
    )
    vision = dict(
        image_size=cfg.pixels.size_YX[0],
        patch_size=cfg.patch,
        hidden_size=cfg.width,
        intermediate_size=cfg.feed_forward,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        hidden_act=cfg.activation,
        layer_norm_eps=cfg.norm_eps,
    )
    text = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = model_type(config_type(vision_config=vision, text_config=text)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(config, published class, its file as numpy)."""
    cfg = CASES[request.param]
    model, folder = twin(cfg), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return cfg, model, load_file(folder / "model.safetensors")


def loaded(cfg: VitConfig, tensors: dict[str, np.ndarray]) -> vit.Vit:
    tower = cfg.build(nnx.Rngs(0))
    names.assign(tower, names.from_torch(tensors, layouts.names(cfg), names.shapes(tower), ignore=layouts.ignore(cfg)))
    return tower


def images(batch: int, cfg: VitConfig) -> np.ndarray:
    shape = (batch, *cfg.pixels.size_YX, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_tokens_are_those_of_the_published_class(case):
    cfg, model, tensors = case
    images_BYX3 = images(2, cfg)
    with torch.no_grad():
        theirs = model.vision_model(torch.from_numpy(images_BYX3).permute(0, 3, 1, 2), output_hidden_states=True)
    if cfg.feature_layer == -1:
        expected_BSC = theirs.last_hidden_state.numpy()
    else:
        expected_BSC = theirs.hidden_states[cfg.feature_layer].numpy()
    tokens_BNC = jax.jit(loaded(cfg, tensors))(images_BYX3)
    assert tokens_BNC.shape == (2, 16, 24)
    np.testing.assert_allclose(tokens_BNC, expected_BSC[:, int(cfg.class_token) :], rtol=1e-5, atol=1e-5)


def test_every_published_tensor_has_one_leaf_or_is_ignored_by_name(case):
    cfg, _, tensors = case
    table, leaves = layouts.names(cfg), names.shapes(cfg.build(nnx.Rngs(0)))
    assert sorted(name.jax for name in table) == sorted(leaves)
    used = {
        name.torch.replace("{L}", str(layer))
        for name in table
        for layer in range(cfg.num_blocks if "{L}" in name.torch else 1)
    }
    dropped = {key for key in tensors if any(re.fullmatch(pattern, key) for pattern in layouts.ignore(cfg))}
    assert used.isdisjoint(dropped)
    assert used | dropped == set(tensors)


def test_import_undoes_export_bit_for_bit(case):
    cfg, _, tensors = case
    tower = loaded(cfg, tensors)
    published = names.to_torch(names.flatten(tower), layouts.names(cfg))
    for key, tensor in published.items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key, strict=True)
    again = loaded(cfg, published)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(tower))


def test_blocks_behind_the_feature_layer_are_not_built():
    assert CASES["clip-llava"].build(nnx.Rngs(0)).blocks.up.kernel.shape == (2, 24, 32)
    assert not hasattr(CASES["siglip-earlier"].build(nnx.Rngs(0)), "post_norm")


def test_tokens_lie_in_row_major_order():
    """Without blocks to mix them, a patch that lights up moves one token: row 1, column 2 of a 2 x 3 grid is token 5."""
    cfg = dataclasses.replace(SIGLIP, pixels=Pixels(size_YX=(8, 12)), post_norm=False)
    tower = cfg.build(nnx.Rngs(0))
    for leaf in (tower.blocks.attention.out, tower.blocks.down):
        leaf.kernel[...] = jnp.zeros_like(leaf.kernel[...])
    dark_BYX3 = np.zeros((1, 8, 12, 3), np.float32)
    light_BYX3 = dark_BYX3.copy()
    light_BYX3[0, 4:8, 8:12] = 1.0
    moved_N = np.abs(tower(light_BYX3) - tower(dark_BYX3)).max((0, 2)) > 0
    assert cfg.grid_HW == (2, 3)
    np.testing.assert_array_equal(moved_N, [False] * 5 + [True])


@pytest.fixture(scope="module")
def everything():
    """(state, compiled forward, images) of a tower with every option on."""
    graphdef, state = nnx.split(EVERYTHING.build(nnx.Rngs(0)))
    run = jax.jit(lambda state, images_BYX3: nnx.merge(graphdef, state)(images_BYX3))
    return state, run, images(2, EVERYTHING)


def test_images_in_a_batch_do_not_mix(everything):
    state, run, images_BYX3 = everything
    changed_BYX3 = images_BYX3.copy()
    changed_BYX3[1] = 0.0
    before_BNC, after_BNC = run(state, images_BYX3), run(state, changed_BYX3)
    np.testing.assert_array_equal(after_BNC[0], before_BNC[0])
    assert np.abs(after_BNC[1] - before_BNC[1]).max() > 1e-3


def test_jit_equals_eager_in_graph_and_tree_mode(everything):
    _, run, images_BYX3 = everything
    tower = EVERYTHING.build(nnx.Rngs(0))
    graph_BNC = run(nnx.split(tower, graph=True)[1], images_BYX3)
    graphdef, state = nnx.split(tower, graph=False)
    tree_BNC = jax.jit(lambda state: nnx.merge(graphdef, state)(images_BYX3))(state)
    eager_BNC = tower(images_BYX3)
    np.testing.assert_allclose(graph_BNC, eager_BNC, atol=1e-6)
    np.testing.assert_allclose(tree_BNC, eager_BNC, atol=1e-6)


def test_bfloat16_stays_bfloat16_and_close(everything):
    state, run, images_BYX3 = everything
    narrow_BNC = run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state), images_BYX3.astype(jnp.bfloat16))
    assert narrow_BNC.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow_BNC.astype(jnp.float32), run(state, images_BYX3), atol=0.05)


def test_every_parameter_learns():
    """Frozen in a study, but `patch_labels` trains a small tower with this very code."""
    graphdef, state = nnx.split(EVERYTHING.build(nnx.Rngs(0)))
    images_BYX3 = images(2, EVERYTHING)
    weights_BNC = np.random.default_rng(1).normal(size=(2, 16, 24)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda state: (nnx.merge(graphdef, state)(images_BYX3) * weights_BNC).sum()))
    for path, leaf in names.flatten(gradient(state)).items():
        if path != "blocks/attention/key/bias":  # softmax cancels it
            assert np.abs(leaf).max() > 1e-6, path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "heads=5 must divide width=24"),
        ({"activation": "swish"}, "activation='swish' is unknown; possible:.*quick_gelu"),
        ({"feature_layer": -4}, "feature_layer=-4 must count from the end: -3 ... -1"),
        ({"feature_layer": 0}, "feature_layer=0"),
        ({"patch": 19}, "must hold at least one patch=19"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **changes)


def test_images_of_another_size_say_why():
    with pytest.raises(ValueError, match=r"images_BYX3 is \[1, 16, 18, 3\].*reads \[B, 18, 18, 3\]"):
        CLIP.build(nnx.Rngs(0))(jnp.zeros((1, 16, 18, 3)))
