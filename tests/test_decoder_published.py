"""Published LLMs: sizes that add up, config.json in every spelling, folders of larger models, refusals by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from configs import llms
from tcjax.assemble import assemble
from tcjax.compressors import mlp
from tcjax.interop.prefixes import places, recognise
from tcjax.llms import published
from tcjax.llms.decoder import LlmConfig
from tcjax.vlm import VlmConfig
from tests.decoder_twins import CASES, LLAMA, loaded, prompt, randomise
from tests.tiny import TOWER

PARAMETERS = {
    "llama_2_7b": 6_738_415_616,
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "llama_3_8b": 8_030_261_248,
    "llama_3_70b": 70_553_706_496,
    "llama_3_1_8b": 8_030_261_248,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_2_3b": 3_212_749_824,
    "mistral_7b_v0_1": 7_241_732_096,
    "mistral_7b_v0_2": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "qwen2_0_5b": 494_032_768,
    "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
}
PUBLISHED: list[LlmConfig] = [getattr(llms, name)() for name in PARAMETERS]


def parameters(cfg: LlmConfig) -> int:
    """Of the module itself, built abstractly with one layer and with two: every layer is the second again."""
    first, second = (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda c=c: c.build(nnx.Rngs(0))))))
        for c in (dataclasses.replace(cfg, layers=1), dataclasses.replace(cfg, layers=2))
    )
    return first + (cfg.layers - 1) * (second - first)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_add_up(name):
    assert parameters(getattr(llms, name)()) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in getattr(llms, name).__doc__


def test_every_published_size_is_counted():
    assert {name for name, f in vars(llms).items() if getattr(f, "__module__", "") == llms.__name__} == set(PARAMETERS)


@pytest.mark.parametrize("cfg", [*PUBLISHED, *CASES.values()], ids=[*PARAMETERS, *CASES])
def test_a_config_survives_its_own_config_json(cfg):
    assert published.of_json(json.loads(json.dumps(published.to_json(cfg)))) == cfg


# The files on the hub, without the fields that a decoder has no use for.
VICUNA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_5 = {
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SPARSE = {"model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064, "max_position_embeddings": 4096}
LLAVA = {"model_type": "llava", "text_config": SPARSE, "image_token_index": 32000, "pad_token_id": 32001}


@pytest.mark.parametrize(
    "config, cfg",
    [
        (VICUNA, llms.vicuna_7b()),
        (MISTRAL, llms.mistral_7b_v0_1()),
        (MISTRAL | {"rope_theta": 1e6, "sliding_window": None}, llms.mistral_7b_v0_2()),
        (QWEN2_5, llms.qwen2_5_0_5b()),
        (QWEN3, llms.qwen3_0_6b()),
        (LLAVA, dataclasses.replace(llms.vicuna_7b(), vocab=32_064)),
        (VICUNA | {"model_type": "llava_llama", "mm_hidden_size": 1024}, llms.vicuna_7b()),
    ],
    ids=["vicuna", "mistral 0.1", "mistral 0.2", "qwen2.5", "qwen3", "llava-1.5-7b-hf", "llava-v1.5-7b"],
)
def test_files_of_the_hub_are_the_presets(config, cfg):
    assert published.of_json(config) == cfg
    assert published.disagreements(cfg, config) == {}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2' is not computed here; known are llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe' is not computed here"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not computed here"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not computed here, only 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not computed here"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not computed here"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config=\{'quant_method': 'gptq'\}"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4.0}},
            "rope type 'longrope' .* known are default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' follows the length .*=4096 it is no scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None is no number"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "have rotary positions of their own"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "differ; keep one",
        ),
        ({"num_attention_heads": 30, "num_key_value_heads": 30}, "hidden_size=4096 is no multiple of .*=30"),
        ({"hidden_size": "4096"}, "hidden_size='4096' is no whole number"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 20},
            "12 of 32 layers have a sliding",
        ),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VICUNA | {"sliding_window": 4096} | change))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        published.llm(tmp_path)


def test_a_folder_without_a_readable_config_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"config.json does not exist; a downloaded checkpoint is a folder"):
        published.llm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="is not JSON"):
        published.llm(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, no table of fields"):
        published.llm(tmp_path)


def test_a_checkpoint_is_one_path_below_the_root_and_any_field_can_be_changed(tmp_path):
    (tmp_path / "checkpoints/vicuna").mkdir(parents=True)
    (tmp_path / "checkpoints/vicuna/config.json").write_text(json.dumps(VICUNA))
    cfg = published.llm("checkpoints/vicuna", root=tmp_path)
    assert cfg == llms.vicuna_7b("checkpoints/vicuna")
    assert published.llm("checkpoints/vicuna", root=tmp_path, layers=2).layers == 2


def test_disagreements_name_every_field_with_both_values():
    cfg = dataclasses.replace(llms.vicuna_7b("anywhere"), norm_eps=1e-6, rope_theta=1e6)
    assert published.disagreements(cfg, VICUNA) == {"norm_eps": (1e-5, 1e-6), "rope_theta": (1e4, 1e6)}
    assert published.disagreements(cfg, LLAVA)["vocab"] == (32_064, 32_000)


def test_no_published_class_has_every_combination():
    for changes in ({"qkv_bias": True, "qk_norm": True}, {"mlp_bias": True, "qk_norm": True}, {"out_bias": True}):
        with pytest.raises(ValueError, match="no published decoder"):
            published.to_json(dataclasses.replace(LLAMA, **changes))
    with pytest.raises(ValueError, match="no published decoder has a sliding window, and biases"):
        published.to_json(dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, window=3))


def llava(folder) -> transformers.LlavaForConditionalGeneration:
    """LLaVA around a tiny Llama, every tensor random, saved as transformers 5 saves it."""
    text = transformers.AutoConfig.for_model(**published.to_json(LLAMA))
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=28)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


def test_the_llm_of_a_llava_folder_is_read_strictly(tmp_path):
    model = llava(tmp_path)
    cfg = published.llm(tmp_path, weights="")
    assert cfg == LLAMA
    tensors = load_file(tmp_path / "model.safetensors")
    place = places(tensors, published.LAYOUTS, published.SIGN, "an LLM")
    llm = loaded(cfg, {name: tensors[there] for name, there in place.items()})
    tokens_BS, valid_BS = prompt("none")
    with torch.no_grad():
        expected_BSV = model(input_ids=torch.from_numpy(tokens_BS)).logits.numpy()
    logits_BSV = llm.logits(llm(llm.embed(tokens_BS), valid_BS))
    np.testing.assert_allclose(logits_BSV, expected_BSV, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"language_model.surprise is no tensor of a LLaVA checkpoint"):
        places([*tensors, "language_model.surprise"], published.LAYOUTS, published.SIGN, "an LLM")


def test_a_run_takes_its_llm_from_a_llava_folder_and_from_no_other_architecture(tmp_path):
    llava(tmp_path / "llava")
    config = VlmConfig(tower=TOWER, compressor=mlp.Config(), llm=published.llm("llava", root=tmp_path))
    model, _ = assemble(config, root=tmp_path)
    tensors = load_file(tmp_path / "llava/model.safetensors")
    for n in range(LLAMA.layers):
        gate = tensors[f"language_model.model.layers.{n}.mlp.gate_proj.weight"]
        np.testing.assert_array_equal(np.asarray(model.llm.blocks.gate.kernel[...])[n], gate.T)
    save_file({"transformer.wte.weight": np.zeros((2, 2), np.float32)}, tmp_path / "gpt2.safetensors")
    other = dataclasses.replace(config, llm=dataclasses.replace(LLAMA, weights="gpt2.safetensors"))
    with pytest.raises(ValueError, match=r"an LLM in gpt2.safetensors is not there(.|\n)*transformer.wte.weight"):
        assemble(other, root=tmp_path)


def test_layouts_of_other_publishers_are_recognised_too():
    original = ["model.embed_tokens.weight", "lm_head.weight", "model.mm_projector.0.weight"]
    assert places(original, published.LAYOUTS, published.SIGN, "an LLM").keys() == set(original[:2])
    memory = ["model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower.x"]
    assert places(memory, published.LAYOUTS, published.SIGN, "an LLM").keys() == set(original[:2])
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        recognise(["transformer.wte.weight"], published.LAYOUTS, published.SIGN, "an LLM")
