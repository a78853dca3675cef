"""A Hugging Face directory of a stock class, where one computes exactly what was trained; loads without any of our code.

    mlp                    LlavaForConditionalGeneration        tower read before its last norm
    pixel_shuffle linear   Idefics3ForConditionalGeneration     SigLIP read behind its last norm
    idefics2_resampler     Idefics2ForConditionalGeneration     the same; projection as wide as the LLM's feed-forward
    pixel_shuffle mlp      InternVLForConditionalGeneration     InternViT, the only tower this class has

Layouts are the ones files on the hub have (transformers, servers and converters all read them); the outer
`tie_word_embeddings` is always written, several classes default to a tied head whatever the LLM says; no computed buffer
is. Everything is loaded and compared before the folder is published (tcjax.export.hf_folder).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tcjax.config import Run
from tcjax.export import hf_folder, hosts, origin
from tcjax.interop import names
from tcjax.towers.vit import VitConfig
from tcjax.vlm import Vlm, VlmConfig

KIND = "Hugging Face directory"
# transformers computes Idefics2's and 3's position of patch i of n as a float32 bucket, which is i - 1 for some i of these
# n, even for whole square images. Measured for n < 80 (tests/test_hf.py).
MISCOUNTED = (19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62, 67, 68, 71, 72, 73, 74, 76, 77)
COUNTED = 80


class Host(NamedTuple):
    """A stock class. why_not(facts, config): "" if it computes this compressor in this model. config: outer fields.

    key: published name of a compressor's tensor -> its name in the class. tower, llm: prefixes for vision_model.* and
    for model.* ("lm_head.weight" goes to `head`).
    """

    name: str
    model_type: str
    after_norm: bool
    why_not: Callable[[dict, VlmConfig], str]
    config: Callable[[dict, VitConfig], dict[str, Any]]
    key: Callable[[str], str]
    tower: str
    llm: str
    head: str
    image_token: str = "image_token_id"
    towers: tuple[str, ...] = ("CLIP", "SigLIP")


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
        hosts.why_no_tower(config.seen, after_norm=host.after_norm, classes=host.towers),
        hosts.why_no_llm(config.llm),
        host.why_not(facts, config),
    )
    reason = next((reason for reason in reasons if reason), "")
    return f"{host.name}: {reason}" if reason else ""


def export(run: Run, model: Vlm, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()) -> Path:
    config, facts = run.model, origin.facts(run)
    assert isinstance(config, VlmConfig)
    host, tower = _host(facts), config.seen
    assert host is not None
    chat = hf_folder.chat_of(run, root)
    ids = hf_folder.token_ids(chat)
    vision = hosts.tower_config(tower)
    if host.model_type.startswith("idefics"):
        vision = {key: value for key, value in vision.items() if key != "vision_use_head"}
        vision["model_type"] = f"{host.model_type}_vision"
    weights = {host.key(key): tensor for key, tensor in compressor_tensors(model, config).items()}
    weights |= {host.tower + key: tensor for key, tensor in _tower(model, tower, host, root).items()}
    for key, tensor in hosts.llm_tensors(model.llm, config.llm).items():
        weights[host.head if key == "lm_head.weight" else host.llm + key.removeprefix("model.")] = tensor
    outer = {
        "architectures": [host.name],
        "model_type": host.model_type,
        "vision_config": vision,
        "text_config": hosts.llm_config(config.llm, ids),
        host.image_token: chat.image_id,
        "tie_word_embeddings": config.llm.tie,
        "dtype": "float32",
        **host.config(facts, tower),
        **ids,
    }
    about = f"A vision-language model trained with tcjax, in the stock class {host.name}."
    if host.model_type.startswith("idefics"):
        about += " It wants an axis of images: `inputs['pixel_values'] = inputs['pixel_values'][:, None]`."
    return hf_folder.write(KIND, outer, weights, run, model, identity, out=out, root=root, about=about)


def compressor_tensors(model: Vlm, config: VlmConfig) -> names.Arrays:
    """Under their published names."""
    return hosts.compressor_tensors(model.compressor, config.compressor, config.widths)


def _tower(model: Vlm, tower: VitConfig, host: Host, root: Path) -> names.Arrays:
    found = hosts.tower_tensors(model.tower, tower, root)
    return hosts.internvit_tensors(found, tower) if host is INTERNVL else found


def _host(facts: dict) -> Host | None:
    kind = facts["family"], facts.get("head")
    return {
        ("mlp", None): LLAVA,
        ("pixel_shuffle", "linear"): IDEFICS3,
        ("pixel_shuffle", "mlp"): INTERNVL,
        ("idefics2_resampler", None): IDEFICS2,
    }.get(kind)


def _strategy(tower: VitConfig) -> dict[str, Any]:
    strategy = "default" if tower.class_token else "full"
    return {"vision_feature_layer": tower.feature_layer, "vision_feature_select_strategy": strategy}


def _llava_why_not(facts: dict, config: VlmConfig) -> str:
    return "" if facts["depth"] == 2 else f"its projector has 2 linear layers, this one {facts['depth']}"


def _idefics3_why_not(facts: dict, config: VlmConfig) -> str:
    """Idefics2 and 3 build a SigLIP of their own and read it behind its last norm."""
    if not config.seen.norms_last:
        return "it reads its tower behind the last norm (feature_layer=-1)"
    side = config.seen.full_HW[0]
    if side in MISCOUNTED or side >= COUNTED:
        return f"transformers rounds positions of a {side} x {side} grid in this class to those of their neighbours"
    return ""


def _idefics2_why_not(facts: dict, config: VlmConfig) -> str:
    D, F = facts["llm_width"], config.llm.feed_forward
    if facts["projection"] != F:
        return f"its projection is as wide as the LLM's feed-forward, {F}, this one {facts['projection']}"
    if facts["feed_forward"] != 4 * D:
        return f"its latents' feed-forward is 4 times as wide as they are, {4 * D}, this one {facts['feed_forward']}"
    if facts["num_queries"] != facts["max_queries"]:
        return f"it uses all of its {facts['max_queries']} latents, this run {facts['num_queries']} of them"
    return _idefics3_why_not(facts, config)


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


LLAVA = Host(
    name="LlavaForConditionalGeneration",
    model_type="llava",
    after_norm=False,
    why_not=_llava_why_not,
    config=lambda facts, tower: {
        "image_seq_length": facts["num_queries"],
        "projector_hidden_act": facts["activation"],
        "multimodal_projector_bias": True,
        **_strategy(tower),
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
    config=lambda facts, tower: {"scale_factor": facts["factor"]},
    key=lambda key: f"model.connector.{key}",
    tower="model.",
    llm="model.text_model.",
    head="lm_head.weight",
    towers=("SigLIP",),
)
IDEFICS2 = Host(
    name="Idefics2ForConditionalGeneration",
    model_type="idefics2",
    after_norm=True,
    why_not=_idefics2_why_not,
    config=lambda facts, tower: {
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
)
INTERNVL = Host(
    name="InternVLForConditionalGeneration",
    model_type="internvl",
    after_norm=True,
    why_not=_internvl_why_not,
    config=lambda facts, tower: {
        "image_seq_length": facts["num_queries"],
        "downsample_ratio": 1 / facts["factor"],
        "projector_hidden_act": facts["activation"],
        **_strategy(tower),
    },
    key=_internvl_key,
    tower="vision_tower.",
    llm="language_model.model.",
    head="language_model.lm_head.weight",
    towers=("InternViT",),
)
