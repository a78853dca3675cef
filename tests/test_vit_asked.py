"""What a compressor asks of the tower, as transformers has it: earlier layers, a smaller grid, the class token."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from tcjax.config import Pixels
from tcjax.export import blip2, hosts
from tests.planted import planted
from tests.test_vit import CLIP, EVERYTHING, SIGLIP, behind, images, loaded, twin


@pytest.fixture(scope="module", params=["clip", "siglip"])
def published(request, tmp_path_factory):
    """(config of a whole grid, the class, its tensors)."""
    cfg = dataclasses.replace({"clip": CLIP, "siglip": SIGLIP}[request.param], pixels=Pixels(size_YX=(16, 16)))
    model, folder = twin(cfg), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return cfg, model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("levels", [(), (0, 2, 3)])
def test_the_class_token_comes_first_where_it_is_kept(published, levels):
    cfg, model, tensors = published
    asked = dataclasses.replace(behind(cfg, -2), levels=levels)
    if not cfg.class_token:
        with pytest.raises(ValueError, match=r"keep_class=True, but this tower has no class token .*; choose a tower"):
            dataclasses.replace(asked, keep_class=True)
        return
    kept, images_BYX3 = dataclasses.replace(asked, keep_class=True), images(2, cfg)
    with torch.no_grad():
        theirs = model.vision_model(torch.from_numpy(images_BYX3).permute(0, 3, 1, 2), output_hidden_states=True)
    expected_BSE = torch.cat([theirs.hidden_states[layer] for layer in (-2, *levels)], -1).numpy()
    found_BSE = jax.jit(loaded(kept, tensors))(images_BYX3)
    assert found_BSE.shape[1] == kept.num_tokens == 17
    np.testing.assert_allclose(found_BSE, expected_BSE, rtol=1e-5, atol=1e-5)
    dropped_BNE = jax.jit(loaded(asked, tensors))(images_BYX3)
    np.testing.assert_allclose(found_BSE[:, 1:], dropped_BNE, rtol=1e-5, atol=1e-6)


def test_tokens_of_blip2s_tower_are_those_of_its_class():
    """Through the names that an export writes, 17 tokens behind the last norm."""
    cfg = dataclasses.replace(EVERYTHING, pre_norm=False, keep_class=True, activation="gelu")
    tower = planted(cfg)
    found = hosts.tower_tensors(tower, cfg, Path())
    model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**hosts.tower_sizes(cfg))).eval()
    tensors = {key.removeprefix("vision_model."): value for key, value in blip2.tower_tensors(found, cfg).items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=True)
    images_BYX3 = images(2, cfg)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images_BYX3).permute(0, 3, 1, 2)).last_hidden_state
    np.testing.assert_allclose(jax.jit(tower)(images_BYX3), theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_levels_are_the_hidden_states(published, feature_layer):
    cfg, model, tensors = published
    asked = dataclasses.replace(behind(cfg, feature_layer), levels=(0, 2, 3))
    images_BYX3 = images(2, cfg)
    with torch.no_grad():
        theirs = model.vision_model(torch.from_numpy(images_BYX3).permute(0, 3, 1, 2), output_hidden_states=True)
    last = theirs.last_hidden_state if feature_layer == -1 else theirs.hidden_states[feature_layer]
    expected_BNC = torch.cat([last, *(theirs.hidden_states[level] for level in (0, 2, 3))], -1)[
        :, int(cfg.class_token) :
    ]
    found_BNC = jax.jit(loaded(asked, tensors))(images_BYX3)
    np.testing.assert_allclose(found_BNC, expected_BNC.numpy(), rtol=1e-5, atol=1e-5)


def test_a_shrunk_tower_sees_the_resized_image_with_resized_positions(published):
    cfg, model, tensors = published
    images_BYX3 = images(2, cfg)
    small_BYX3 = jax.image.resize(images_BYX3, (2, 8, 8, 3), "bilinear")
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(small_BYX3)).permute(0, 3, 1, 2)
        theirs = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    found_BNC = jax.jit(loaded(dataclasses.replace(cfg, shrunk_HW=(2, 2)), tensors))(images_BYX3)
    np.testing.assert_allclose(found_BNC, theirs.numpy()[:, int(cfg.class_token) :], rtol=1e-5, atol=1e-5)


def test_the_resized_image_is_pils_up_to_rounding():
    """Bilinear with antialiasing, as image processors do it, and not every second pixel."""
    from PIL import Image

    grey_YX = np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)
    expected_YX = np.asarray(Image.fromarray(grey_YX).resize((8, 8), Image.Resampling.BILINEAR), np.float32)
    tower = nnx.eval_shape(
        lambda: dataclasses.replace(EVERYTHING, pixels=Pixels(size_YX=(16, 16)), shrunk_HW=(2, 2)).build(nnx.Rngs(0))
    )
    found = tower._shrunk(np.repeat(grey_YX[None, ..., None], 3, -1).astype(np.float32))
    assert np.abs(np.asarray(found)[0, ..., 0] - expected_YX).max() <= 1  # Pillow rounds after each of the two passes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (4,)}, r"levels=\(4,\) must be hidden states of this tower: 0 \.\.\. 3"),
        ({"shrunk_HW": (5, 1)}, r"shrunk_HW=\(5, 1\) must be from \(1, 1\) to the tower's own grid \(4, 4\)"),
    ],
)
def test_what_the_tower_cannot_give_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **change)
