"""NAMES tables of the published towers: leaf of a tower <-> tensor on disk, and before which names a file puts them.

CLIP, SigLIP and SigLIP2 share one table, DINOv2 with and without registers the other. The same tower lies on disk under
several prefixes, and the file's own names say which one it is:

    vision_model.                               CLIP, SigLIP, SigLIP2 as published, with or without their text half
    (none)                                      the vision class alone as transformers 5 saves it; DINOv2 as published
    vision_tower.vision_model.                  inside LLaVA as published; vision_tower. as transformers 5 saves it
    model.vision_tower.(vision_model.)          inside LLaVA under transformers 5's names in memory
    model.vision_tower.vision_tower.vision_model.   inside LLaVA's own format, where it holds the tower
    dinov2.                                     below an image classifier's head

Recognised is the patch embedding, which every tower has once: what stands before it is the prefix, and must be one of
these. Everything below the prefix has a leaf or is ignored by name; so has everything beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tcjax.interop.names import Name
from tcjax.towers.vit import VitConfig

PREFIXES = {
    "clip": (
        "vision_model.",
        "",
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
    ),
    "dinov2": ("", "dinov2."),
}  # each family's first is how it is published


def prefix(tensors: Iterable[str], cfg: VitConfig) -> str:
    """What a file with these tensors puts before the tower's names; as published if it holds no such tower.

    Raises:
        ValueError: the file holds two towers, or one below a name that is not known.
    """
    landmark, known = _PATCH[cfg.names], PREFIXES[cfg.names]
    found = sorted({name.removesuffix(landmark) for name in tensors if name.endswith(landmark)})
    if not found:
        return known[0]
    if len(found) > 1 or found[0] not in known:
        raise ValueError(
            f"{landmark} lies below {found} in this file, and a tower is read from below exactly one of {list(known)}; "
            f"save the tower by itself (its vision class's save_pretrained)."
        )
    return found[0]


def names(cfg: VitConfig, prefix: str | None = None) -> list[Name]:
    """Leaf of `cfg.build` <-> published tensor, below the prefix of a file (None: as published)."""
    before = PREFIXES[cfg.names][0] if prefix is None else prefix
    table = _dinov2(cfg) if cfg.names == "dinov2" else _clip(cfg)
    return [Name(name.jax, before + name.torch, name.op) for name in table]


def ignore(cfg: VitConfig, prefix: str | None = None) -> list[str]:
    """Regular expressions of published tensors this tower has no use for; each must match a whole name.

    The text half and its head, SigLIP's pooling head, DINOv2's mask token, a classifier, the rest of a LLaVA, old
    checkpoints' position ids, and what lies behind `feature_layer`: the blocks after it and the post norm (CLIP's norms
    only the pooled class token).
    """
    before = re.escape(PREFIXES[cfg.names][0] if prefix is None else prefix)
    dinov2 = cfg.names == "dinov2"
    inside = [r"embeddings\.mask_token"] if dinov2 else [r"head\..*", r"embeddings\.position_ids"]
    stack, last = (r"encoder\.layer", "layernorm") if dinov2 else (r"encoder\.layers", "post_layernorm")
    inside += [rf"{stack}\.{layer}\..*" for layer in range(cfg.num_blocks, cfg.layers)]
    inside += [] if cfg.norms_last else [rf"{last}\..*"]
    return [before + pattern for pattern in inside] + _beside(cfg, prefix)


def _beside(cfg: VitConfig, prefix: str | None) -> list[str]:
    if cfg.names == "dinov2":
        return [r"classifier\..*"] if prefix else []
    if prefix is None or prefix == "vision_model.":
        return [r"text_model\..*", r"(text_projection|visual_projection)\.weight", r"logit_scale|logit_bias"]
    if not prefix:
        return []
    return [
        r"language_model\..*",
        r"multi_modal_projector\..*",
        r"model\.(?!vision_tower\.).*",
        r"lm_head\..*",
        r"image_newline",
    ]


def _clip(cfg: VitConfig) -> list[Name]:
    cuts = "transpose" if cfg.ragged else "patches"  # NaFlex's patches are cut before: a matrix, no convolution
    table = [
        Name("patch/kernel", _PATCH["clip"], cuts),
        Name("position", "embeddings.position_embedding.weight", "same"),
    ]
    if cfg.patch_bias:
        table.append(Name("patch/bias", "embeddings.patch_embedding.bias", "same"))
    if cfg.class_token:
        table.append(Name("class_token", "embeddings.class_embedding", "same"))
    norms = {"blocks/attention_norm": "layer_norm1", "blocks/mlp_norm": "layer_norm2"}
    norms = {ours: f"encoder.layers.{{L}}.{theirs}" for ours, theirs in norms.items()}
    if cfg.pre_norm:
        norms["pre_norm"] = "pre_layrnorm"  # the published spelling
    if cfg.norms_last:
        norms["post_norm"] = "post_layernorm"
    linears = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    return table + _norms(norms) + _linears(linears, "encoder.layers.{L}.")


def _dinov2(cfg: VitConfig) -> list[Name]:
    table = [
        Name("patch/kernel", _PATCH["dinov2"], "patches"),
        Name("patch/bias", "embeddings.patch_embeddings.projection.bias", "same"),
        Name("class_token", "embeddings.cls_token", "unsqueeze twice"),
        Name("position", "embeddings.position_embeddings", "unsqueeze"),
        Name("blocks/attention_scale", "encoder.layer.{L}.layer_scale1.lambda1", "same"),
        Name("blocks/mlp_scale", "encoder.layer.{L}.layer_scale2.lambda1", "same"),
    ]
    if cfg.registers:
        table.append(Name("registers", "embeddings.register_tokens", "unsqueeze"))
    norms = {"blocks/attention_norm": "encoder.layer.{L}.norm1", "blocks/mlp_norm": "encoder.layer.{L}.norm2"}
    if cfg.norms_last:
        norms["post_norm"] = "layernorm"
    linears = {
        "attention/query": "attention.attention.query",
        "attention/key": "attention.attention.key",
        "attention/value": "attention.attention.value",
        "attention/out": "attention.output.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    return table + _norms(norms) + _linears(linears, "encoder.layer.{L}.")


def _norms(pairs: dict[str, str]) -> list[Name]:
    table = []
    for ours, theirs in pairs.items():
        table += [Name(f"{ours}/scale", f"{theirs}.weight", "same"), Name(f"{ours}/bias", f"{theirs}.bias", "same")]
    return table


def _linears(pairs: dict[str, str], layer: str) -> list[Name]:
    table = []
    for ours, theirs in pairs.items():
        table.append(Name(f"blocks/{ours}/kernel", f"{layer}{theirs}.weight", "transpose"))
        table.append(Name(f"blocks/{ours}/bias", f"{layer}{theirs}.bias", "same"))
    return table


_PATCH = {"clip": "embeddings.patch_embedding.weight", "dinov2": "embeddings.patch_embeddings.projection.weight"}
