"""Tower and LLM as Hugging Face knows them: which class computes what ours does, its config, its tensors.

    clip_vision_model     class token, norm before the first block, no patch bias
    siglip_vision_model   patch bias, norm after the last block
    internvl_vision       class token, patch bias (InternViT; its layer scales are 1 here)
    blip_2_vision_model   the same, one matrix for q, k, v (EVA's ViT; tcjax.export.blip2)
    llama, mistral, qwen2, qwen3   whichever tcjax.llms.published says that the decoder is

Config fields are those of the published checkpoints (the old rope fields too: every version of transformers reads them).
A tower read at an earlier layer is written whole, as the class builds it: blocks behind that layer come from the tower's
own file, or hold zeros where the tower was trained from scratch; nothing reads them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from tcjax.assemble import places, published_names
from tcjax.export.artifact import finite
from tcjax.interop import names, tensors
from tcjax.llms import published
from tcjax.llms.decoder import LlmConfig
from tcjax.nn import lora
from tcjax.towers import layouts
from tcjax.towers.dual import DualConfig
from tcjax.towers.vit import VitConfig


def why_no_tower(
    tower: VitConfig | DualConfig, *, after_norm: bool, classes: Collection[str] = ("CLIP", "SigLIP")
) -> str:
    """Why no published class computes this tower's tokens; "" if one does.

    Args:
        after_norm: whether the host reads a tower at -1 behind its last norm (`last_hidden_state`), as Idefics3 and
            InternVL do; Llava reads it before.
        classes: of towers that the host can have.
    """
    if isinstance(tower, DualConfig):
        return "the tower is two towers side by side, which no published host has"
    if tower.ragged:
        return "the tower reads images of any shape (NaFlex), which no published host does"
    kinds = tower_classes(tower)
    if tower.shrunk_HW is not None:
        return "the image is resized inside the tower, which no published tower does"
    if len(set(tower.full_HW)) > 1 or len(set(tower.pixels.size_YX)) > 1:
        return f"published towers read square images, this one {tower.pixels.size_YX[0]} x {tower.pixels.size_YX[1]}"
    if tower.position_HW != tower.full_HW:
        return f"the position table is resized from {tower.position_HW} to {tower.full_HW}, which published hosts do not do"
    if set(kinds).isdisjoint(classes):
        return f"the tower is {' or '.join(kinds) or 'no published one'}, and the host has {' or '.join(classes)}"
    if tower.feature_layer != -1:
        return ""
    if "CLIP" in kinds and tower.post_norm:
        return "CLIP's patches do not go through its last norm, this tower's do"
    if "SigLIP" in kinds and after_norm and not tower.post_norm:
        return "the host reads SigLIP behind its last norm, this tower has none"
    if "SigLIP" in kinds and not after_norm and tower.post_norm:
        return "the host reads SigLIP before its last norm, this tower is read behind it (feature_layer=-1)"
    return ""


def why_not_behind_norm(tower: VitConfig) -> str:
    """Why a host that always reads its tower behind the last norm does not fit; "" if it does."""
    return "" if tower.norms_last else "it reads its tower behind the last norm (feature_layer=-1)"


def tower_classes(tower: VitConfig) -> tuple[str, ...]:
    """The published architectures that this tower is."""
    if tower.names == "dinov2":
        return ("DINOv2",)
    kind = tower.class_token, tower.pre_norm, tower.patch_bias
    return {
        (True, True, False): ("CLIP",),
        (False, False, True): ("SigLIP",),
        (True, False, True): ("InternViT", "EVA-ViT"),
    }.get(kind, ())


def select_strategy(tower: VitConfig) -> str:
    """Llava's `vision_feature_select_strategy`: "default" drops the first token."""
    return "default" if tower.class_token and not tower.keep_class else "full"


def why_no_llm(llm: LlmConfig) -> str:
    """Why no published class computes this decoder; "" if one does."""
    return published.why_unpublished(llm)


def tower_config(tower: VitConfig) -> dict[str, Any]:
    """`vision_config` of CLIP, SigLIP or InternViT."""
    kind = tower_classes(tower)[0]
    return {
        "model_type": {"CLIP": "clip_vision_model", "SigLIP": "siglip_vision_model"}.get(kind, "internvl_vision"),
        **tower_sizes(tower),
        **({"vision_use_head": False} if kind == "SigLIP" else {}),
        **({"attention_bias": True, "use_mean_pooling": not tower.post_norm} if kind == "InternViT" else {}),
    }


def tower_sizes(tower: VitConfig) -> dict[str, Any]:
    """The fields that the `vision_config` of every class has."""
    return {
        "image_size": tower.pixels.size_YX[0],
        "patch_size": tower.patch,
        "num_channels": 3,
        "hidden_size": tower.width,
        "intermediate_size": tower.feed_forward,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.norm_eps,
        "dtype": "float32",
    }


def llm_config(llm: LlmConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """`text_config` of the published class. tokens: ids by the config's own field names."""
    return {**published.to_json(llm), "dtype": "float32", **tokens}


def tower_tensors(tower: nnx.Module, cfg: VitConfig, root: Path) -> names.Arrays:
    """Every tensor of the published class, "vision_model.embeddings.patch_embedding.weight" and so on."""
    whole = dataclasses.replace(cfg, feature_layer=-1, levels=(), post_norm=True)
    shapes = names.shapes(nnx.eval_shape(lambda: whole.build(nnx.Rngs(0))))
    expected = names.published_shapes(layouts.names(whole), shapes)
    ours = names.to_torch(finite(names.flatten(tower)), layouts.names(cfg))
    file = tensors.load(root / cfg.weights) if cfg.weights and expected.keys() - ours.keys() else {}
    named = {key: file[there] for key, there in places(cfg, file).items()} if file else {}
    found = {key: tensor for key, tensor in named.items() if key in expected} | ours
    for key, shape in expected.items():
        found.setdefault(key, np.full(shape, float("norm" in key and key.endswith("weight")), np.float32))
    return found


def llm_tensors(llm: nnx.Module, cfg: LlmConfig) -> names.Arrays:
    """Every tensor of the published class, "model.embed_tokens.weight" and so on; a tied head is not among them.

    LoRA is merged into the kernels.
    """
    return names.to_torch(finite(lora.merged(llm, names.flatten(llm))), published_names(cfg)[0])


def compressor_tensors(compressor: nnx.Module, config: Any, widths: Any) -> names.Arrays:
    """The compressor's tensors under its published names."""
    return names.to_torch(finite(names.flatten(compressor)), config.names(widths))


def internvit_tensors(found: names.Arrays, cfg: VitConfig) -> names.Arrays:
    """The tensors of `tower_tensors` under the names of InternVL's vision tower; its layer scales become 1."""
    renamed: names.Arrays = {}
    for key, tensor in found.items():
        for pattern, name in _INTERNVIT:
            key = re.sub(pattern, name, key)
        if key in ("embeddings.cls_token", "embeddings.position_embeddings"):
            tensor = tensor.reshape(1, -1, cfg.width)
        renamed[key] = tensor
    if not cfg.post_norm:
        renamed = {key: tensor for key, tensor in renamed.items() if not key.startswith("layernorm.")}
    for layer in range(cfg.layers):
        renamed |= {f"encoder.layer.{layer}.lambda_{n}": np.ones(cfg.width, np.float32) for n in (1, 2)}
    return renamed


_INTERNVIT = [
    (r"^vision_model\.", ""),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "embeddings.position_embeddings"),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.self_attn\.out_proj\.", ".attention.projection_layer."),
    (r"\.self_attn\.", ".attention."),
    (r"\.layer_norm1\.", ".layernorm_before."),
    (r"\.layer_norm2\.", ".layernorm_after."),
    (r"^post_layernorm\.", "layernorm."),
]
