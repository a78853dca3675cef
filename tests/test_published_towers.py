"""A downloaded tower's folder says what it is, as transformers wrote it and as the hub has it; another one is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from configs import towers
from tcjax.config import Pixels
from tcjax.towers import published
from tests.saved_towers import CLIP, DINOV2, REGISTERS, SIGLIP, TOWERS, images, kind, loaded, pixels, saved, twin

SIZE = {"height": 16, "width": 16}
PROCESSORS = {
    "clip": lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE),
    "siglip": lambda: transformers.SiglipImageProcessorPil(size=SIZE),
    "naflex": lambda: transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=24),
    "dinov2": lambda: transformers.BitImageProcessorPil(size={"shortest_edge": 9}, crop_size={"height": 8, "width": 8}),
}
PROCESSORS["registers"] = PROCESSORS["dinov2"]


def without(cfg, *fields):
    """Everything that config.json decides, as a dict."""
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name not in fields}


@pytest.fixture(scope="module", params=TOWERS)
def folder(request, tmp_path_factory):
    """(name, folder as transformers saves model and processor)."""
    place = saved(twin(TOWERS[request.param]), tmp_path_factory.mktemp(request.param))
    PROCESSORS[request.param]().save_pretrained(place)
    return request.param, place


def test_a_saved_folder_is_its_config(folder):
    name, place = folder
    cfg, read = TOWERS[name], published.tower(place)
    assert without(read, "pixels", "weights", "table_HW") == without(cfg, "pixels", "weights", "table_HW")
    assert read.position_HW == cfg.position_HW and read.weights == str(place)
    assert published.tower(place.name, root=place.parent).weights == place.name
    published.check(place, read)
    if name in ("dinov2", "registers"):
        assert (read.pixels.geometry, read.pixels.shortest, read.grid_HW) == ("crop", 9, (2, 2))
    assert kind(read) == name


def test_the_tower_of_a_folder_sees_what_its_class_sees(folder):
    """DINOv2's at 8 x 8 pixels, with the table of 16 x 16 resized."""
    name, place = folder
    read = published.tower(place)
    given = (images(read, 2),) + ((np.array([[4, 6], [2, 3]], np.int32),) if read.ragged else ())
    found_BNC = np.asarray(jax.jit(loaded(read, place))(*given))
    with torch.no_grad():
        if read.ragged:
            mask = torch.tensor([[True] * 24, [True] * 6 + [False] * 18])
            flat = torch.from_numpy(given[0].reshape(2, 24, 48))
            theirs = twin(TOWERS[name])(
                flat, pixel_attention_mask=mask, spatial_shapes=torch.from_numpy(given[1]).long()
            )
            np.testing.assert_allclose(found_BNC[mask], theirs.last_hidden_state[mask], rtol=1e-5, atol=1e-5)
            return
        theirs = twin(TOWERS[name])(pixels(given[0])).last_hidden_state[:, read.num_prefix :]
    np.testing.assert_allclose(found_BNC, theirs, rtol=1e-5, atol=1e-5)


WRONG = {
    "width": ({"hidden_size": 48}, (48, 24)),
    "heads": ({"num_attention_heads": 2}, (2, 3)),
    "norm_eps": ({"layer_norm_eps": 1e-3}, (1e-3, 1e-5)),
    "activation": ({"hidden_act": "gelu"}, ("gelu", "quick_gelu")),
    "position_HW": ({"image_size": 32}, ((8, 8), (4, 4))),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_config_that_says_another_tower_is_refused_with_every_field(field, tmp_path):
    saved(twin(CLIP), tmp_path)
    path = tmp_path / "config.json"
    changes, pair = WRONG[field]
    config = json.loads(path.read_text()) | changes
    assert published.disagreements(CLIP, config) == {field: pair}
    path.write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(ValueError, match=rf"another tower than the one.*\n(.*\n)*  {field}: ") as error:
        published.check(tmp_path, CLIP)
    assert "layers: 7 there, 3 asked for" in str(error.value)


def test_another_family_differs_in_what_makes_it_one(tmp_path):
    config = json.loads((saved(twin(REGISTERS), tmp_path) / "config.json").read_text())
    assert published.disagreements(REGISTERS, config) == {}
    assert published.disagreements(DINOV2, config) == {"registers": (2, 0)}
    assert set(published.disagreements(SIGLIP, config)) >= {"names", "layer_scale", "class_token", "activation"}
    published.check(tmp_path / "nowhere", DINOV2)  # weights without a config.json say nothing


def a_config(tmp_path, config) -> str:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "swin"},
            "model_type='swin' is no tower that is computed here; known are clip_vision_model.*dinov2",
        ),
        (
            {"model_type": "llava", "vision_config": {"model_type": "pixtral"}},
            "'pixtral' is no tower.*with one of them",
        ),
        ({"model_type": "llava"}, "model_type='llava' without a vision_config; read the tower from its own"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn=True is not computed here, only False"),
        ({"model_type": "clip_vision_model", "num_channels": 1}, "num_channels=1 is not computed here, only 3"),
        (
            {"model_type": "clip_vision_model", "image_size": [224, 196]},
            r"image_size=\[224, 196\] must be a whole number",
        ),
        ({"model_type": "siglip2_vision_model", "num_patches": 255}, "num_patches=255 is no square"),
        ({"model_type": "clip_vision_model"}, r"holds no preprocessor_config.json; .*pixels=Pixels\(\.\.\.\)"),
        ("{", "is not JSON .*fetch it again"),
        ([1], "holds list, no table of fields"),
    ],
)
def test_what_is_no_tower_of_ours_says_why(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        published.tower(a_config(tmp_path, config))


def test_a_folder_without_config_says_what_a_checkpoint_is(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; a downloaded checkpoint is a folder with config\.json"):
        published.tower(tmp_path / "nothing")


# As the hub has them: fields at their class's default are left out.
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_DINO_L = {key: value for key, value in _L.items() if key != "intermediate_size"} | {"image_size": 518}
_CLIP_IMAGES = {"image_processor_type": "CLIPImageProcessor"}
_DINO_IMAGES = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _siglip(size: int, **fields) -> dict:
    return {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}} | fields


HUB = {
    "clip_b_16": ({"model_type": "clip", "vision_config": {"patch_size": 16}}, _CLIP_IMAGES, 0),
    "clip_l_224": ({"model_type": "clip", "vision_config": _L}, _CLIP_IMAGES, 303_179_776),
    "clip_l_336": (
        {"model_type": "clip", "vision_config": _L | {"image_size": 336}},
        _CLIP_IMAGES | {"size": 336, "crop_size": 336},
        303_507_456,
    ),
    "siglip_b_224": ({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}, _siglip(224), 0),
    "siglip_so400m_224": ({"model_type": "siglip", "vision_config": _SO400M | {"patch_size": 14}}, _siglip(224), 0),
    "siglip_so400m_384": (
        {"model_type": "siglip", "vision_config": _SO400M | {"image_size": 384, "patch_size": 14}},
        _siglip(384),
        428_225_600,
    ),
    "siglip2_b_256": ({"model_type": "siglip", "vision_config": {"image_size": 256}}, _siglip(256, resample=2), 0),
    "siglip2_so400m_384": (
        {"model_type": "siglip", "vision_config": _SO400M | {"image_size": 384, "patch_size": 14}},
        _siglip(384, resample=2),
        428_225_600,
    ),
    "siglip2_so400m_512": (
        {"model_type": "siglip", "vision_config": _SO400M | {"image_size": 512}},
        _siglip(512, resample=2),
        0,
    ),
    "siglip2_so400m_naflex": (
        {"model_type": "siglip2", "vision_config": _SO400M | {"model_type": "siglip2_vision_model"}},
        {"image_processor_type": "Siglip2ImageProcessor"},
        427_888_064,
    ),
    "dinov2_b": ({"model_type": "dinov2", "image_size": 518}, _DINO_IMAGES, 86_580_480),
    "dinov2_l": ({"model_type": "dinov2"} | _DINO_L, _DINO_IMAGES, 304_368_640),
    "dinov2_b_registers": (
        {"model_type": "dinov2_with_registers", "image_size": 518, "patch_size": 14},
        _DINO_IMAGES,
        86_580_480 + 4 * 768,
    ),
    "dinov2_l_registers": ({"model_type": "dinov2_with_registers"} | _DINO_L, _DINO_IMAGES, 304_368_640 + 4 * 1024),
}


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_folder_is_the_named_config(name, tmp_path):
    config, preprocessor, _ = HUB[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    read = published.tower(a_config(tmp_path, config))
    here = getattr(towers, name)(feature_layer=-1)
    assert dataclasses.replace(read, weights="") == dataclasses.replace(here, weights="")


@pytest.mark.parametrize("name", HUB)
def test_published_parameters_add_up(name):
    """Ours, plus what is published and never read: CLIP's last norm, SigLIP's pooling head, DINOv2's mask token."""
    config, _, published_count = HUB[name]
    said = config.get("vision_config", config)
    model_type = said.get(
        "model_type", {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(config["model_type"])
    )
    theirs = transformers.AutoConfig.for_model(**(said | {"model_type": model_type}))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(theirs)
    unread = ("head.", "mask_token") + (("post_layernorm",) if "clip" in model_type else ())
    counts = {key: parameter.numel() for key, parameter in model.named_parameters()}
    cfg = getattr(towers, name)(feature_layer=-1)
    read = sum(count for key, count in counts.items() if not any(part in key for part in unread))
    assert parameters(cfg) == read
    if published_count:
        assert sum(counts.values()) == published_count


def parameters(cfg) -> int:
    """From towers of one and two blocks, so that no large one is traced."""
    one, two = (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda c=c: c.build(nnx.Rngs(0))))))
        for c in (dataclasses.replace(cfg, layers=depth) for depth in (1, 2))
    )
    return one + (cfg.layers - 1) * (two - one)


# LLaVA's ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize(("layer", "strategy"), [(-2, "default"), (-1, "full"), (1, "full")])
def test_a_llavas_tower_is_read_where_the_llava_reads_it(tower, layer, strategy, tmp_path):
    text = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    if not tower.class_token and strategy == "default":
        strategy = "full"  # SigLIP has no class token to drop
    config = transformers.LlavaConfig(
        vision_config=twin(tower).config,
        text_config=transformers.LlamaConfig(**text),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.model.multi_modal_projector = torch.nn.Identity()
    place = saved(model, tmp_path)
    read = published.tower(place, pixels=Pixels(size_YX=(16, 16)))
    published.check(place, read)
    images_BYX3 = images(read)
    with torch.no_grad():
        theirs = model.model.get_image_features(
            pixels(images_BYX3), vision_feature_layer=layer, vision_feature_select_strategy=strategy
        )
    theirs = getattr(theirs, "pooler_output", theirs)
    found_BNC = jax.jit(loaded(read, place))(images_BYX3)
    np.testing.assert_allclose(found_BNC, np.stack([np.asarray(x) for x in theirs]), rtol=1e-5, atol=1e-5)


def test_a_llava_that_reads_several_layers_is_refused(tmp_path):
    config = {"model_type": "llava", "vision_config": {}, "vision_feature_layer": [-2, -5]}
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[-2, -5\] reads several layers; VitConfig.levels"):
        published.tower(a_config(tmp_path, config))
