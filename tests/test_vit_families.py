"""DINOv2, and what all families share: every layer, every layout on disk, tables of another grid, meshes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tcjax import assemble
from tcjax.config import MeshConfig, Pixels
from tcjax.interop import names, tensors
from tcjax.sharding import make_mesh, place
from tcjax.towers import layouts
from tests.saved_towers import CLIP, DINOV2, REGISTERS, SIGLIP, TOWERS, images, loaded, pixels, randomised, saved, twin

WHOLE = [name for name in TOWERS if name != "naflex"]


@pytest.fixture(scope="module", params=WHOLE)
def family(request, tmp_path_factory):
    """(config, the published class, its folder)."""
    cfg = TOWERS[request.param]
    model = twin(cfg)
    return cfg, model, saved(model, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
def test_every_feature_layer_is_that_of_the_published_class(family, feature_layer):
    """DINOv2's and SigLIP's last norm belongs to the last layer alone; CLIP's to no patch."""
    cfg, model, folder = family
    asked, images_BYX3 = dataclasses.replace(cfg, feature_layer=feature_layer), images(cfg)
    with torch.no_grad():
        theirs = model(pixels(images_BYX3), output_hidden_states=True)
    last = theirs.last_hidden_state if feature_layer == -1 else theirs.hidden_states[feature_layer]
    found_BNC = jax.jit(loaded(asked, folder))(images_BYX3)
    assert found_BNC.shape == (2, 16, 24)
    np.testing.assert_allclose(found_BNC, last.numpy()[:, cfg.num_prefix :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cfg", [DINOV2, REGISTERS], ids=["dinov2", "registers"])
def test_dinov2_hands_over_its_class_token_and_levels(cfg, tmp_path):
    model = twin(cfg)
    asked = dataclasses.replace(cfg, keep_class=True, feature_layer=-2, levels=(0, 3))
    images_BYX3 = images(cfg)
    with torch.no_grad():
        states = model(pixels(images_BYX3), output_hidden_states=True).hidden_states
    expected_BSE = torch.cat([states[-2], states[0], states[3]], -1).numpy()
    expected_BSE = np.delete(expected_BSE, range(1, 1 + cfg.registers), axis=1)
    found_BSE = jax.jit(loaded(asked, saved(model, tmp_path)))(images_BYX3)
    np.testing.assert_allclose(found_BSE, expected_BSE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size_YX", [(16, 24), (8, 12), (26, 23)], ids=str)
def test_a_table_of_another_grid_is_resized_as_the_published_class_does(family, size_YX):
    """Growing, shrinking and both, with pixels left over: 26 x 23 is 6 x 5 patches."""
    cfg, model, folder = family
    other = dataclasses.replace(cfg, pixels=Pixels(size_YX=size_YX), table_HW=(4, 4))
    images_BYX3 = images(other)
    always = {} if cfg.names == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        theirs = model(pixels(images_BYX3), **always).last_hidden_state
    found_BNC = jax.jit(loaded(other, folder))(images_BYX3)
    assert found_BNC.shape[1] == other.num_tokens
    np.testing.assert_allclose(found_BNC, theirs.numpy()[:, cfg.num_prefix :], rtol=1e-5, atol=1e-5)


def test_the_two_cubic_kernels_differ(tmp_path):
    """So a DINOv2 that is resized as the one with registers is another tower."""
    folder = saved(twin(DINOV2), tmp_path)
    other = dataclasses.replace(DINOV2, pixels=Pixels(size_YX=(8, 8)), table_HW=(4, 4))
    antialiased = dataclasses.replace(other, resize="bicubic antialiased")
    seen = [jax.jit(loaded(cfg, folder))(images(other)) for cfg in (other, antialiased)]
    assert np.abs(seen[0] - seen[1]).max() > 0.01


def test_every_published_tensor_has_one_leaf_or_is_ignored_by_name(family):
    cfg, _, folder = family
    read = dataclasses.replace(cfg, feature_layer=-2)
    on_disk = tensors.load(folder)
    found = assemble.places(read, on_disk)
    table, leaves = layouts.names(read), names.shapes(nnx.eval_shape(lambda: read.build(nnx.Rngs(0))))
    assert sorted(name.jax for name in table) == sorted(leaves)
    used = set(names.published_shapes(table, leaves))
    dropped = {key for key in found if any(re.fullmatch(pattern, key) for pattern in layouts.ignore(read))}
    assert used.isdisjoint(dropped)
    assert used | dropped == set(found) and set(found.values()) == set(on_disk)


def test_import_undoes_export_bit_for_bit(family):
    cfg, _, folder = family
    on_disk = tensors.load(folder)
    published = names.to_torch(names.flatten(loaded(cfg, folder)), layouts.names(cfg))
    found = assemble.places(cfg, on_disk)
    for key, tensor in published.items():
        np.testing.assert_array_equal(tensor, on_disk[found[key]], err_msg=key, strict=True)


@pytest.mark.parametrize("name", TOWERS)
def test_bfloat16_stays_bfloat16_and_close(name, tmp_path):
    cfg = TOWERS[name]
    graphdef, state = nnx.split(cfg.build(nnx.Rngs(0)))
    given = (np.array([[4, 6], [3, 3]], np.int32),) if cfg.ragged else ()
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, *given))
    narrow_BNC = run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state), images(cfg).astype(jnp.bfloat16))
    assert narrow_BNC.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow_BNC.astype(jnp.float32), run(state, images(cfg)), atol=0.1)


@pytest.mark.parametrize("name", ["naflex", "registers"])
def test_every_parameter_learns(name):
    cfg = TOWERS[name]
    graphdef, state = nnx.split(cfg.build(nnx.Rngs(0)))
    given = (images(cfg),) + ((np.array([[4, 6], [3, 3]], np.int32),) if cfg.ragged else ())
    weights_BNC = np.random.default_rng(1).normal(size=(2, cfg.num_tokens, 24)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda state: (nnx.merge(graphdef, state)(*given) * weights_BNC).sum()))
    for path, leaf in names.flatten(gradient(state)).items():
        assert np.isfinite(leaf).all(), path
        if path != "blocks/attention/key/bias":  # softmax cancels it
            assert np.abs(leaf).max() > 1e-6, path


# Layouts -------------------------------------------------------------------------------------------------------------

INSIDE = [
    "vision_model.",
    "",
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "model.vision_tower.vision_tower.vision_model.",
]
BESIDE = {
    "vision_model.": ["text_model.embeddings.token_embedding.weight", "logit_scale", "visual_projection.weight"],
    "": [],
    "model.vision_tower.vision_tower.vision_model.": ["model.layers.0.mlp.up_proj.weight", "model.mm_projector.0.bias"],
}
LLAVA = ["language_model.model.norm.weight", "multi_modal_projector.linear_1.bias"]
IN_MEMORY = ["model.language_model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("prefix", INSIDE)
def test_the_same_tower_is_read_from_every_layout(prefix, tmp_path):
    saved(twin(CLIP), tmp_path / "alone")
    arrays = {prefix + key: array for key, array in tensors.load(tmp_path / "alone").items()}
    beside = BESIDE.get(prefix, LLAVA if prefix.startswith("vision_tower.") else IN_MEMORY)
    arrays |= {key: np.zeros(2, np.float32) for key in beside}
    tensors.save(tmp_path / "inside" / "model.safetensors", arrays)
    images_BYX3 = images(CLIP)
    expected_BNC = loaded(CLIP, tmp_path / "alone")(images_BYX3)
    np.testing.assert_array_equal(loaded(CLIP, tmp_path / "inside")(images_BYX3), expected_BNC)


def test_a_tower_is_read_out_of_a_llava_and_a_classifier(tmp_path):
    text = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = twin(CLIP).config
    llava = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**text))
    model = randomised(transformers.LlavaForConditionalGeneration(llava))
    images_BYX3 = images(CLIP)
    with torch.no_grad():
        theirs = model.model.vision_tower(pixels(images_BYX3)).last_hidden_state.numpy()
    found_BNC = loaded(CLIP, saved(model, tmp_path / "llava"))(images_BYX3)
    np.testing.assert_allclose(found_BNC, theirs[:, 1:], rtol=1e-5, atol=1e-5)
    model = randomised(transformers.Dinov2ForImageClassification(twin(DINOV2).config))
    with torch.no_grad():
        theirs = model.dinov2(pixels(images_BYX3)).last_hidden_state.numpy()
    found_BNC = loaded(DINOV2, saved(model, tmp_path / "dinov2"))(images_BYX3)
    np.testing.assert_allclose(found_BNC, theirs[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_this_tower_or_with_two_is_refused(tmp_path):
    saved(twin(DINOV2), tmp_path / "dinov2")
    with pytest.raises(
        ValueError, match=r"(?s)a tower with clip names in .* is not there\. .*encoder\.layer\.{0\.\.2}"
    ):
        loaded(CLIP, tmp_path / "dinov2")
    arrays = tensors.load(saved(twin(CLIP), tmp_path / "clip"))
    arrays |= {"vision_model." + key: array for key, array in arrays.items()}
    tensors.save(tmp_path / "twice" / "model.safetensors", arrays)
    with pytest.raises(ValueError, match="is there 2 times"):
        loaded(CLIP, tmp_path / "twice")
    with pytest.raises(ValueError, match=r"SHAPE \(\d+\)"):
        loaded(dataclasses.replace(CLIP, feed_forward=32), tmp_path / "clip")
    with pytest.raises(ValueError, match="MISSING"):
        loaded(SIGLIP, tmp_path / "clip")


# Meshes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_one_device_equals_eight(name, sizes, tmp_path):
    cfg = dataclasses.replace(TOWERS[name], heads=4, probes=("column_means",), levels=(1,))
    graphdef, state = nnx.split(loaded(cfg, saved(twin(cfg), tmp_path)))
    given = (images(cfg, 8),) + ((np.array([[4, 6], [3, 3]] * 4, np.int32),) if cfg.ragged else ())
    run = jax.jit(lambda state, *given: nnx.merge(graphdef, state)(*given))
    expected = run(state, *given)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    spread = jax.device_put(given, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    found = run(place(state, mesh), *spread)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
