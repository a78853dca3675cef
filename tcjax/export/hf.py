"""A Hugging Face directory of a stock class, where one computes exactly what was trained; loads without any of our code.

    mlp                    LlavaForConditionalGeneration        tower read before its last norm
    pixel_shuffle linear   Idefics3ForConditionalGeneration     SigLIP read behind its last norm
    idefics2_resampler     Idefics2ForConditionalGeneration     the same; projection as wide as the LLM's feed-forward
    pixel_shuffle mlp      InternVLForConditionalGeneration     InternViT, the only tower this class has
    qformer                Blip2ForConditionalGeneration        EVA-ViT with its class token, behind its last norm
    qformer with text      InstructBlipForConditionalGeneration the same

Layouts are the ones files on the hub have (transformers, servers and converters all read them); the outer
`tie_word_embeddings` is always written, several classes default to a tied head whatever the LLM says; no computed buffer
is. Everything is loaded and compared before the folder is published (tcjax.export.hf_folder).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tcjax.config import Run
from tcjax.export import hf_chat, hf_folder, hosts, origin, stock
from tcjax.export.blip2 import BLIP2, INSTRUCTBLIP
from tcjax.export.stock import Host
from tcjax.interop import names
from tcjax.towers.vit import VitConfig
from tcjax.vlm import Vlm, VlmConfig

KIND = "Hugging Face directory"
# transformers computes Idefics2's and 3's position of patch i of n as a float32 bucket, which is i - 1 for some i of these
# n, even for whole square images. Measured for n < 80 (tests/test_hf.py).
MISCOUNTED = (19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62, 67, 68, 71, 72, 73, 74, 76, 77)
COUNTED = 80


def why_not(run: Run) -> str:
    if reason := origin.why_not(run):
        return reason
    config, facts = run.model, origin.facts(run)
    assert isinstance(config, VlmConfig)
    host = _host(facts)
    if host is None:
        return f"no stock class computes {facts['family']}; hf-remote holds it with its own code"
    if facts["frames"] != 1:
        return f"{host.name} reads images, not videos of {facts['frames']} frames"
    reasons = (
        hf_chat.why_not(run),
        hosts.why_no_tower(config.seen, after_norm=host.after_norm, classes=host.towers),
        hosts.why_no_llm(config.llm),
        host.why_not(facts, config),
    )
    reason = next((reason for reason in reasons if reason), "")
    return f"{host.name}: {reason}" if reason else ""


def export(run: Run, model: Vlm, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()) -> Path:
    config, facts = run.model, origin.facts(run)
    assert isinstance(config, VlmConfig)
    host, tower = _host(facts), config.one_tower
    assert host is not None
    chat = hf_chat.chat_of(run, root)
    ids = hf_chat.token_ids(chat)
    weights = {host.key(key): tensor for key, tensor in compressor_tensors(model, config).items()}
    of_tower = host.tower_tensors(hosts.tower_tensors(model.tower, tower, root), tower)
    weights |= {host.tower + key: tensor for key, tensor in of_tower.items()}
    for key, tensor in hosts.llm_tensors(model.llm, config.llm).items():
        weights[host.head if key == "lm_head.weight" else host.llm + key.removeprefix("model.")] = tensor
    weights = host.derived(weights)
    outer = {
        "architectures": [host.name],
        "model_type": host.model_type,
        "vision_config": host.vision(tower),
        "text_config": hosts.llm_config(config.llm, ids),
        host.image_token: chat.image_id,
        "tie_word_embeddings": config.llm.tie,
        "dtype": "float32",
        **host.config(facts, config),
        **ids,
    }
    about = f"A vision-language model trained with tcjax, in the stock class {host.name}. {host.about}".strip()
    return hf_folder.write(
        KIND, outer, weights, run, model, identity, out=out, root=root, about=about, prepare=host.prepare
    )


def compressor_tensors(model: Vlm, config: VlmConfig) -> names.Arrays:
    """Under their published names."""
    return hosts.compressor_tensors(model.compressor, config.compressor, config.widths)


def _host(facts: dict) -> Host | None:
    kind = facts["family"], facts.get("head", facts.get("text"))
    return {
        ("mlp", None): LLAVA,
        ("pixel_shuffle", "linear"): IDEFICS3,
        ("pixel_shuffle", "mlp"): INTERNVL,
        ("idefics2_resampler", None): IDEFICS2,
        ("qformer", False): BLIP2,
        ("qformer", True): INSTRUCTBLIP,
    }.get(kind)


def _strategy(tower: VitConfig) -> dict[str, Any]:
    strategy = hosts.select_strategy(tower)
    return {"vision_feature_layer": tower.feature_layer, "vision_feature_select_strategy": strategy}


def _siglip_of(model_type: str, tower: VitConfig) -> dict[str, Any]:
    """`vision_config` of a class that has its own copy of SigLIP."""
    fields = {key: value for key, value in hosts.tower_config(tower).items() if key != "vision_use_head"}
    return fields | {"model_type": model_type}


def _llava_why_not(facts: dict, config: VlmConfig) -> str:
    return "" if facts["depth"] == 2 else f"its projector has 2 linear layers, this one {facts['depth']}"


def _idefics3_why_not(facts: dict, config: VlmConfig) -> str:
    """Idefics2 and 3 build a SigLIP of their own and read it behind its last norm."""
    if reason := hosts.why_not_behind_norm(config.one_tower):
        return reason
    side = config.one_tower.full_HW[0]
    if side in MISCOUNTED or side >= COUNTED:
        return f"transformers rounds positions of a {side} x {side} grid in this class to those of their neighbours"
    return ""


def _idefics2_why_not(facts: dict, config: VlmConfig) -> str:
    D, F = facts["llm_width"], config.llm.feed_forward
    if facts["projection"] != F:
        return f"its projection is as wide as the LLM's feed-forward, {F}, this one {facts['projection']}"
    if facts["feed_forward"] != 4 * D:
        return f"its latents' feed-forward is 4 times as wide as they are, {4 * D}, this one {facts['feed_forward']}"
    return stock.why_not_all_queries(facts, "latents") or _idefics3_why_not(facts, config)


def _internvl_why_not(facts: dict, config: VlmConfig) -> str:
    s, side = facts["factor"], config.widths.grid_HW[0]
    ratio = 1 / s
    if side % ratio != 0 or int(side * ratio) * s != side or int(1 / ratio) != s:
        return f"its downsample_ratio 1/{s} is rounded, and {side} / {s} tokens do not come out; powers of two do"
    return ""


def _internvl_key(key: str) -> str:
    layer = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
    _, number, kind = key.split(".")
    return f"multi_modal_projector.{layer[number]}.{kind}"


_AN_AXIS_OF_IMAGES = 'inputs["pixel_values"] = inputs["pixel_values"][:, None]  # this class has an axis of images'
LLAVA = Host(
    name="LlavaForConditionalGeneration",
    model_type="llava",
    after_norm=False,
    why_not=_llava_why_not,
    config=lambda facts, config: {
        "image_seq_length": facts["num_queries"],
        "projector_hidden_act": facts["activation"],
        "multimodal_projector_bias": True,
        **_strategy(config.one_tower),
    },
    key=lambda key: f"multi_modal_projector.linear_{1 + int(key[0]) // 2}{key[1:]}",
    tower="vision_tower.",
    llm="language_model.model.",
    head="language_model.lm_head.weight",
    image_token="image_token_index",
)
IDEFICS3 = Host(
    name="Idefics3ForConditionalGeneration",
    model_type="idefics3",
    after_norm=True,
    why_not=_idefics3_why_not,
    config=lambda facts, config: {"scale_factor": facts["factor"]},
    key=lambda key: f"model.connector.{key}",
    tower="model.",
    llm="model.text_model.",
    head="lm_head.weight",
    towers=("SigLIP",),
    vision=partial(_siglip_of, "idefics3_vision"),
    prepare=_AN_AXIS_OF_IMAGES,
)
IDEFICS2 = Host(
    name="Idefics2ForConditionalGeneration",
    model_type="idefics2",
    after_norm=True,
    why_not=_idefics2_why_not,
    config=lambda facts, config: {
        "perceiver_config": {
            "hidden_size": facts["llm_width"],
            "hidden_act": facts["activation"],
            "resampler_n_latents": facts["num_queries"],
            "resampler_depth": facts["depth"],
            "resampler_n_heads": facts["heads"],
            "resampler_head_dim": facts["head_width"],
            "num_key_value_heads": facts["kv_heads"],
            "rms_norm_eps": facts["norm_eps"],
        }
    },
    key=lambda key: f"model.connector.{key}",
    tower="model.",
    llm="model.text_model.",
    head="lm_head.weight",
    towers=("SigLIP",),
    vision=partial(_siglip_of, "idefics2_vision"),
    prepare=_AN_AXIS_OF_IMAGES,
)
INTERNVL = Host(
    name="InternVLForConditionalGeneration",
    model_type="internvl",
    after_norm=True,
    why_not=_internvl_why_not,
    config=lambda facts, config: {
        "image_seq_length": facts["num_queries"],
        "downsample_ratio": 1 / facts["factor"],
        "projector_hidden_act": facts["activation"],
        **_strategy(config.one_tower),
    },
    key=_internvl_key,
    tower="vision_tower.",
    llm="language_model.model.",
    head="language_model.lm_head.weight",
    towers=("InternViT",),
    tower_tensors=hosts.internvit_tensors,
)
