"""NAMES tables of the published towers, leaf of a tower <-> published tensor, and where on disk such tensors lie.

CLIP, SigLIP and SigLIP2 share one table, DINOv2 with and without registers the other. The same tower lies on disk under
several prefixes (`LAYOUTS`); a file's own names say which one it is, by the patch embedding, which every tower has once.
Everything published has a leaf or is ignored by name.
"""

from __future__ import annotations

from tcjax.interop.names import Name
from tcjax.interop.prefixes import Layout
from tcjax.towers.vit import VitConfig

SIGN = {
    "clip": "vision_model.embeddings.patch_embedding.weight",
    "dinov2": "embeddings.patch_embeddings.projection.weight",
}
_LLAVA = ("language_model.", "multi_modal_projector.", "lm_head.", "image_newline")
_IN_MEMORY = ("model.language_model.", "model.multi_modal_projector.", "lm_head.", "model.image_newline")
_ORIGINAL = (
    "model.layers.",
    "model.norm.",
    "model.embed_tokens.",
    "model.mm_projector.",
    "lm_head.",
    "model.image_newline",
)
LAYOUTS = {
    "clip": [
        Layout("CLIP or SigLIP as published", {"": ""}),
        Layout("vision class as transformers 5 saves it", {"vision_model.": ""}),
        Layout("LLaVA", {"vision_model.": "vision_tower.vision_model."}, _LLAVA),
        Layout("LLaVA as transformers 5 saves it", {"vision_model.": "vision_tower."}, _LLAVA),
        Layout("LLaVA in memory", {"vision_model.": "model.vision_tower.vision_model."}, _IN_MEMORY),
        Layout("LLaVA in the memory of transformers 5", {"vision_model.": "model.vision_tower."}, _IN_MEMORY),
        Layout("LLaVA's own format", {"vision_model.": "model.vision_tower.vision_tower.vision_model."}, _ORIGINAL),
    ],
    "dinov2": [
        Layout("DINOv2 as published", {"": ""}),
        Layout("DINOv2 with a classifier", {"": "dinov2."}, ("classifier.",)),
    ],
}


def names(cfg: VitConfig) -> list[Name]:
    """Leaf of `cfg.build` <-> published tensor."""
    return _dinov2(cfg) if cfg.names == "dinov2" else _clip(cfg)


def ignore(cfg: VitConfig) -> list[str]:
    """Regular expressions of published tensors this tower has no use for; each must match a whole name.

    The text half and its head, SigLIP's pooling head, old checkpoints' position ids, DINOv2's mask token, and what lies
    behind `feature_layer`: the blocks after it and the post norm (CLIP's norms only the pooled class token).
    """
    behind = range(cfg.num_blocks, cfg.layers)
    if cfg.names == "dinov2":
        patterns = [r"embeddings\.mask_token", *(rf"encoder\.layer\.{layer}\..*" for layer in behind)]
        return patterns + ([] if cfg.norms_last else [r"layernorm\..*"])
    patterns = [
        r"text_model\..*",
        r"(text_projection|visual_projection)\.weight",
        r"logit_scale|logit_bias",
        r"vision_model\.head\..*",
        r"vision_model\.embeddings\.position_ids",
    ]
    patterns += [rf"vision_model\.encoder\.layers\.{layer}\..*" for layer in behind]
    return patterns + ([] if cfg.norms_last else [r"vision_model\.post_layernorm\..*"])


_LAYER = "vision_model.encoder.layers.{L}."


def _clip(cfg: VitConfig) -> list[Name]:
    cuts = "transpose" if cfg.ragged else "patches"  # NaFlex's patches are cut before: a matrix, no convolution
    table = [
        Name("patch/kernel", SIGN["clip"], cuts),
        Name("position", "vision_model.embeddings.position_embedding.weight", "same"),
    ]
    if cfg.patch_bias:
        table.append(Name("patch/bias", "vision_model.embeddings.patch_embedding.bias", "same"))
    if cfg.class_token:
        table.append(Name("class_token", "vision_model.embeddings.class_embedding", "same"))
    norms = {"blocks/attention_norm": "layer_norm1", "blocks/mlp_norm": "layer_norm2"}
    norms = {ours: _LAYER + theirs for ours, theirs in norms.items()}
    if cfg.pre_norm:
        norms["pre_norm"] = "vision_model.pre_layrnorm"  # the published spelling
    if cfg.norms_last:
        norms["post_norm"] = "vision_model.post_layernorm"
    linears = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    return table + _norms(norms) + _linears(linears, _LAYER)


def _dinov2(cfg: VitConfig) -> list[Name]:
    table = [
        Name("patch/kernel", SIGN["dinov2"], "patches"),
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
