"""Published PyTorch connectors become artifacts: whole, by name, bit for bit; what does not fit is listed, bombs are not lit."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tcjax.assemble import assemble
from tcjax.cli import main
from tcjax.compressors import (
    c_abstractor,
    idefics2_resampler,
    matryoshka_query,
    mlp,
    pixel_shuffle,
    qformer,
    qwen_resampler,
    resampler,
    spatial_resampler,
)
from tcjax.compressors.base import Widths
from tcjax.export.artifact import load_artifact
from tcjax.export.torch import verify
from tcjax.export.warm_start import import_artifact
from tcjax.interop import names, tensors
from tests.exported import CASES, WIDTHS, artifact
from tests.hosted import a_run
from tests.planted import planted
from tests.test_lavis import CHECKPOINT

VISION = dict(
    image_size=16, patch_size=4, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
TEXT = dict(
    vocab_size=32,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
)


def numbers(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor random, none at an initial 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def text_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**TEXT)


def llava() -> torch.nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=3)
    return transformers.LlavaForConditionalGeneration(config)


def internvl() -> torch.nn.Module:
    vision = transformers.InternVLVisionConfig(**VISION | {"image_size": [16, 16], "patch_size": [4, 4]})
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(vision_config=vision, text_config=text_config(), image_token_id=3)
    )


def idefics3() -> torch.nn.Module:
    return transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(vision_config=VISION, text_config=text_config(), image_token_id=3)
    )


def idefics2() -> torch.nn.Module:
    perceiver = dict(hidden_size=12, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4)
    perceiver |= dict(resampler_head_dim=6, num_key_value_heads=2, rms_norm_eps=1e-5)
    return transformers.Idefics2ForConditionalGeneration(
        transformers.Idefics2Config(
            vision_config=VISION, perceiver_config=perceiver, text_config=text_config(), image_token_id=3
        )
    )


QFORMER = dict(vocab_size=20, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=12)
OPT = dict(
    vocab_size=32, hidden_size=12, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=12
)


def blip2() -> torch.nn.Module:
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER | {"encoder_hidden_size": 8},
        text_config=transformers.OPTConfig(**OPT).to_dict(),
        num_query_tokens=5,
        image_token_index=3,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def instruct_blip() -> torch.nn.Module:
    config = transformers.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"encoder_hidden_size": 8, "max_position_embeddings": 9},
        text_config=transformers.OPTConfig(**OPT).to_dict(),
        num_query_tokens=5,
        image_token_index=3,
    )
    return transformers.InstructBlipForConditionalGeneration(config)


QFORMER_CONFIG = qformer.Config(num_queries=5, depth=4, width=8, heads=2, feed_forward=12, class_token=True)
INSTRUCT = dataclasses.replace(QFORMER_CONFIG, text=True, max_text=9)
CLASSES = {  # name: (class, config, publisher, tensors whose names in the file are other than in the artifact)
    "llava": (llava, mlp.Config(), "LLaVA in transformers"),
    "internvl": (internvl, pixel_shuffle.Config(num_queries=4, head="mlp"), "InternVL in transformers"),
    "idefics3": (idefics3, pixel_shuffle.Config(num_queries=4), "Idefics3"),
    "idefics2": (
        idefics2,
        idefics2_resampler.Config(num_queries=5, depth=2, heads=4, kv_heads=2, head_width=6, projection=20, eps=1e-5),
        "Idefics2",
    ),
    "blip2": (blip2, QFORMER_CONFIG, "BLIP-2 or InstructBLIP in transformers"),
    "instruct_blip": (instruct_blip, INSTRUCT, "BLIP-2 or InstructBLIP in transformers"),
}


@pytest.mark.parametrize("layout", ["old", "in memory", "shards"])
@pytest.mark.parametrize("case", CLASSES)
def test_a_checkpoint_of_the_class_itself_becomes_an_artifact(case, layout, tmp_path):
    make, config, publisher = CLASSES[case]
    model = numbers(make())
    shard = {"max_shard_size": "8KB"} if layout == "shards" else {}
    model.save_pretrained(tmp_path / "published", save_original_format=layout == "old", **shard)
    assert (tmp_path / "published/model.safetensors.index.json").exists() is (layout == "shards")
    found = import_artifact(tmp_path / "published", tmp_path / "out")
    assert (found.publisher, found.config, found.widths.grid_HW) == (publisher, config, (4, 4))
    text = case == "instruct_blip"
    assert found.widths.num_tokens == (17 if "blip" in case else 16)
    assert tensors.load(tmp_path / "out/golden.safetensors")["plain.tokens"].shape[1] == found.widths.num_tokens
    assert found.fresh == (["text_proj.weight", "text_proj.bias"] if text else [])
    assert found.share == 1 if not text else 0.9 < found.share < 1
    assert verify.check(tmp_path / "out")["problems"] == []
    published = tensors.load(tmp_path / "out/compressor.safetensors")
    theirs = [parameter.detach().numpy() for parameter in model.parameters()]
    for name, array in published.items():
        if name not in found.fresh:
            assert any(array.shape == other.shape and np.array_equal(array, other) for other in theirs), name


LLAVA = {"0.weight": (12, 8), "0.bias": (12,), "2.weight": (12, 12), "2.bias": (12,)}


def drawn(shapes: dict, prefix: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {prefix + key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_llavas_own_pickle_in_every_type(tmp_path, prefix, dtype):
    weights = drawn(LLAVA, prefix, dtype)
    torch.save(weights, tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}))
    found = import_artifact(tmp_path / "mm_projector.bin", tmp_path / "out")
    assert (found.publisher, found.config, found.widths.grid_HW) == ("LLaVA", mlp.Config(), (24, 24))
    for key, array in tensors.load(tmp_path / "out/compressor.safetensors").items():
        np.testing.assert_array_equal(array, weights[prefix + key].float().numpy(), strict=True)


def test_llavas_linear_projector_has_no_number_in_its_names(tmp_path):
    save_file(drawn({"weight": (12, 8), "bias": (12,)}, "model.mm_projector."), tmp_path / "linear.safetensors")
    found = import_artifact(tmp_path / "linear.safetensors", tmp_path / "out", grid_HW=(3, 5))
    assert found.config == mlp.Config(depth=1)
    assert found.widths == Widths(grid_HW=(3, 5), vision_C=8, llm_D=12, text_D=12)


def test_internvls_own_names(tmp_path):
    shapes = {"0.weight": (32,), "0.bias": (32,), "1.weight": (12, 32), "1.bias": (12,)}
    shapes |= {"3.weight": (12, 12), "3.bias": (12,)}
    save_file(drawn(shapes, "mlp1."), tmp_path / "model.safetensors")
    found = import_artifact(tmp_path, tmp_path / "out", grid_HW=(4, 4))
    assert (found.publisher, found.config, found.widths.vision_C) == (
        "InternVL",
        pixel_shuffle.Config(num_queries=4, head="mlp"),
        8,
    )


def flamingo(prefix: str, *, frames: bool = True) -> dict[str, torch.Tensor]:
    C, inner = 8, 8 * 3
    shapes = {"latents": (5, C), "norm.weight": (C,), "norm.bias": (C,)} | ({"frame_embs": (2, C)} if frames else {})
    for layer in range(2):
        attention, feed = f"layers.{layer}.0.", f"layers.{layer}.1."
        shapes |= {attention + f"norm_{x}.{kind}": (C,) for x in ("media", "latents") for kind in ("weight", "bias")}
        shapes |= {attention + "to_q.weight": (inner, C), attention + "to_kv.weight": (2 * inner, C)}
        shapes |= {attention + "to_out.weight": (C, inner), feed + "0.weight": (C,), feed + "0.bias": (C,)}
        shapes |= {feed + "1.weight": (4 * C, C), feed + "3.weight": (C, 4 * C)}
    return drawn(shapes, prefix)


def test_openflamingo_has_no_layer_to_an_llm_and_gets_a_new_one(tmp_path):
    weights = flamingo("module.perceiver.")
    torch.save({"model_state_dict": weights, "epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="--llm-width says how wide it shall be"):
        import_artifact(tmp_path / "checkpoint.pt", tmp_path / "out", grid_HW=(4, 4))
    found = import_artifact(tmp_path / "checkpoint.pt", tmp_path / "out", grid_HW=(4, 4), llm_D=12)
    assert found.config == resampler.Config(num_queries=5, depth=2, heads=8, head_width=3, ff_mult=4, max_frames=2)
    assert found.fresh == ["out_proj.weight", "out_proj.bias"]
    published = tensors.load(tmp_path / "out/compressor.safetensors")
    read = sum(array.numel() for array in weights.values())
    assert found.share == pytest.approx(read / (read + 8 * 12 + 12))
    for name, array in weights.items():
        np.testing.assert_array_equal(published[name.removeprefix("module.perceiver.")], array.numpy())
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["provenance"]["fresh"] == found.fresh


def test_lavis_is_known_by_its_names(tmp_path):
    torch.save({"model": {name: torch.from_numpy(array) for name, array in CHECKPOINT.items()}}, tmp_path / "lavis.pth")
    found = import_artifact(tmp_path / "lavis.pth", tmp_path / "out", grid_HW=(1, 7))
    heads = found.config.heads  # of 64 channels in all published files; 8 are too few for one
    assert (found.publisher, found.config.text, found.config.max_text) == ("BLIP-2 or InstructBLIP in LAVIS", True, 9)
    assert heads == 1
    del found
    first_stage = {name: array for name, array in CHECKPOINT.items() if not name.startswith("llm_proj")}
    torch.save({name: torch.from_numpy(array) for name, array in first_stage.items()}, tmp_path / "stage1.pth")
    found = import_artifact(tmp_path / "stage1.pth", tmp_path / "stage1", grid_HW=(1, 7), llm_D=10)
    assert not found.config.text
    assert found.fresh == ["language_projection.weight", "language_projection.bias"]


@pytest.mark.parametrize("case", ["mlp", "pixel_shuffle_mlp"])
def test_import_undoes_export_bit_for_bit(case, tmp_path):
    """What an artifact holds, written under a publisher's names, comes back as the same bytes."""
    prefix = {"mlp": "model.mm_projector.", "pixel_shuffle_mlp": ""}[case]
    published = tensors.load(artifact(case) / "compressor.safetensors")
    tensors.save(tmp_path / "model.safetensors", {prefix + key: array for key, array in published.items()})
    found = import_artifact(tmp_path, tmp_path / "out", grid_HW=WIDTHS.grid_HW)
    assert found.config == CASES[case] if case == "mlp" else found.config.head == "mlp"
    assert tensors.content_hash(tmp_path / "out/compressor.safetensors") == tensors.content_hash(published)


LAYOUTS = {  # name: (config, prefix, publisher, what has to be said)
    "honeybee": (
        c_abstractor.Config(num_queries=4, depth=2, hidden=12),
        "abstractor.",
        "Honeybee",
        {"num_queries": 4},
    ),
    "qwen_vl": (qwen_resampler.Config(num_queries=4), "transformer.visual.", "Qwen-VL", {}),
    "minicpm_v2": (
        qwen_resampler.Config(num_queries=4, form="minicpm_v2"),
        "resampler.",
        "MiniCPM-V 2.0 or OmniLMM",
        {},
    ),
    "minicpm_v25": (qwen_resampler.Config(num_queries=5, form="minicpm_v25"), "resampler.", "MiniCPM-V 2.5 to 4.5", {}),
    "uhd": (
        qwen_resampler.Config(num_queries=4, form="uhd"),
        "model.mm_projector.",
        "LLaVA-UHD",
        {"family": "qwen_resampler"},
    ),
    "uhd_v1": (
        spatial_resampler.Config(num_queries=4),
        "model.mm_projector.",
        "LLaVA-UHD v1",
        {"family": "spatial_resampler"},
    ),
    "mqt": (
        matryoshka_query.Config(num_queries=4, max_queries=4),
        "model.mm_projector.",
        "MQT-LLaVA",
        {},
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_without_a_class_comes_back_bit_for_bit(case, dtype, tmp_path):
    config, prefix, publisher, said = LAYOUTS[case]
    widths = Widths(grid_HW=(4, 4), vision_C=64, llm_D=128, text_D=128)
    module = planted(config, widths)
    published = names.to_torch(names.flatten(module), config.names(widths))
    written = {prefix + key: array.astype(dtype) for key, array in published.items()}
    tensors.save(tmp_path / "model.safetensors", written)
    found = import_artifact(tmp_path, tmp_path / "out", grid_HW=(4, 4), **said)
    assert (found.publisher, found.config, found.widths, found.share) == (publisher, config, widths, 1)
    for key, array in tensors.load(tmp_path / "out/compressor.safetensors").items():
        if key.endswith("pos_embed"):
            np.testing.assert_allclose(array, published[key], atol=1e-6)
        else:
            np.testing.assert_array_equal(array, written[prefix + key].astype(np.float32), err_msg=key)


def test_training_starts_from_an_imported_artifact(tmp_path, capsys):
    square = {"0.weight": (16, 16), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    save_file(drawn(square, "model.mm_projector."), tmp_path / "mm.safetensors")
    assert main(["import", str(tmp_path / "mm.safetensors"), "--out", str(tmp_path / "start"), "--grid", "4x4"]) == 0
    assert "LLaVA, 100.00% of the parameters from the file" in capsys.readouterr().out
    run = a_run(mlp.Config())
    model, _ = assemble(run.model, root=tmp_path, start={"compressor": "start"})
    loaded = load_artifact(tmp_path / "start")
    for path, array in names.flatten(model.compressor).items():
        np.testing.assert_array_equal(array, loaded.arrays[path], strict=True)
    other = a_run(resampler.Config(num_queries=3, depth=1, heads=2, head_width=8))
    with pytest.raises(ValueError, match=r"family: 'mlp', 'resampler'"):
        assemble(other.model, root=tmp_path, start={"compressor": "start"})
    with pytest.raises(ValueError, match="artifact of a compressor; weights for another part"):
        assemble(run.model, root=tmp_path, start={"tower": "start"})
    (tmp_path / "start/compressor.safetensors").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"not what was exported: \['compressor.safetensors'\]"):
        assemble(run.model, root=tmp_path, start={"compressor": "start"})


def test_an_artifact_of_another_grid_starts_a_compressor_of_any_number_of_tokens(tmp_path):
    torch.save(flamingo("perceiver.", frames=False), tmp_path / "checkpoint.pt")
    found = import_artifact(tmp_path / "checkpoint.pt", tmp_path / "start", grid_HW=(9, 9), llm_D=16)
    config = found.config
    assert found.widths.vision_C == 8
    run = a_run(config)
    tower = run.model.tower.__class__(**{**vars(run.model.tower), "width": 8, "heads": 2})
    model, _ = assemble(
        run.model.__class__(tower=tower, compressor=config, llm=run.model.llm),
        root=tmp_path,
        start={"compressor": "start"},
    )
    assert np.array_equal(model.compressor.latents[...], flamingo("", frames=False)["latents"].numpy())
