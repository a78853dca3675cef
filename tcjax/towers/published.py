"""A downloaded checkpoint's config.json and preprocessor_config.json as a VitConfig.

    tower("checkpoints/clip-vit-large-patch14-336")     clip, siglip, siglip2 and their vision classes alone, dinov2,
                                                        dinov2_with_registers; of a LLaVA folder its vision_config
    disagreements(cfg, config)                          {field: (there, here)}, what `check` refuses

A field that config.json leaves out has the default of its published class, as it has for whoever wrote the file: SigLIP-B's
vision_config says none of its sizes. What the tower does not compute is refused by its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcjax.config import Pixels
from tcjax.preprocessor import from_preprocessor
from tcjax.towers.vit import VitConfig

_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP = _CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_DINOV2 = {key: value for key, value in _CLIP.items() if key != "intermediate_size"}
_DINOV2 |= {"patch_size": 14, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": {key: value for key, value in _SIGLIP.items() if key != "image_size"}
    | {"num_patches": 256},
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2 | {"patch_size": 16, "num_register_tokens": 4},
}
_OUTER = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "llava": "clip_vision_model",
    "llava_next": "clip_vision_model",
}  # models with a vision_config, and what its model_type is where it is left out
_NEUTRAL: dict[str, tuple] = {"num_channels": (3,), "use_swiglu_ffn": (False,), "qkv_bias": (True,)}
_PLAIN = dict(class_token=False, patch_bias=True, pre_norm=False, post_norm=True, layer_scale=False, names="clip")
_KINDS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _PLAIN | dict(class_token=True, patch_bias=False, pre_norm=True, post_norm=False),
    "siglip_vision_model": _PLAIN,
    "siglip2_vision_model": _PLAIN | dict(resize="bilinear antialiased"),
    "dinov2": _PLAIN | dict(class_token=True, layer_scale=True, names="dinov2"),
}
_KINDS["dinov2_with_registers"] = _KINDS["dinov2"] | dict(resize="bicubic antialiased")
# What config.json and a cfg must say alike: all that decides what the weights compute. The rest is the reader's choice.
_SAME = (
    *("patch", "width", "layers", "heads", "feed_forward", "activation", "norm_eps", "position_HW"),
    *("class_token", "patch_bias", "pre_norm", "registers", "layer_scale", "names", "ragged"),
)


def tower(folder: str | Path, *, root: Path = Path(), **changes: Any) -> VitConfig:
    """The tower of a downloaded checkpoint, its weights the folder itself.

    A LLaVA's is read where its config.json says (vision_feature_layer, vision_feature_select_strategy), any other behind
    its last layer. Pixels that fill another grid than the position table (DINOv2: 224 of 518) resize the table.

    Args:
        folder: holds config.json, preprocessor_config.json and safetensors; below `root`, as every path of a config is
            below the project's root.
        changes: fields of VitConfig to have otherwise; with `pixels` no preprocessor_config.json is needed.

    Raises:
        ValueError: a file is missing, of another architecture, or asks for what the tower does not compute.
    """
    config = _read(root / folder / "config.json")
    fields = _architecture(config, str(root / folder / "config.json")) | _features(config, str(folder))
    fields |= {"pixels": changes.pop("pixels", None) or _pixels(root / folder), "weights": str(folder)}
    fields["table_HW"] = fields.pop("position_HW")
    del fields["ragged"]
    cfg = VitConfig(**(fields | changes))
    same_grid = not cfg.ragged and cfg.table_HW == cfg.full_HW
    return dataclasses.replace(cfg, table_HW=None) if same_grid else cfg


def disagreements(cfg: VitConfig, config: Mapping[str, Any], where: str = "config.json") -> dict[str, tuple[Any, Any]]:
    """{field: (what config.json says, what cfg says)} of every field in which they differ; {} if they agree."""
    found = _architecture(config, where)
    pairs = {name: (found[name], getattr(cfg, name)) for name in _SAME}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check(folder: Path, cfg: VitConfig) -> None:
    """ValueError naming every difference if a config.json lies in the weights' folder and says something else than cfg."""
    path = folder / "config.json"
    if not path.is_file():
        return
    if wrong := disagreements(cfg, _read(path), str(path)):
        lines = "".join(f"\n  {name}: {there!r} there, {here!r} asked for" for name, (there, here) in wrong.items())
        raise ValueError(
            f"{path} describes another tower than the one that is asked for:{lines}\n"
            f"Read the config from the folder (tcjax.towers.published.tower), or fetch the checkpoint that was meant."
        )


def _architecture(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of VitConfig that config.json decides, and position_HW and ragged."""
    kind, said = _vision(config, where)
    for key, neutral in _NEUTRAL.items():
        if key in said and said[key] not in neutral:
            raise ValueError(
                f"{where}: {key}={said[key]!r} is not computed here, only {neutral[0]!r}; take a checkpoint without it."
            )
    found = DEFAULTS[kind] | {key: value for key, value in said.items() if value is not None}
    width, patch = _whole(found, "hidden_size", where), _whole(found, "patch_size", where)
    dinov2 = "mlp_ratio" in DEFAULTS[kind]
    if "num_patches" in DEFAULTS[kind]:
        patches = _whole(found, "num_patches", where)
        position_HW = (math.isqrt(patches),) * 2
        if position_HW[0] ** 2 != patches:
            raise ValueError(f"{where}: num_patches={patches} is no square, and its position table is one.")
    else:
        position_HW = (_whole(found, "image_size", where) // patch,) * 2
    return {
        "patch": patch,
        "width": width,
        "layers": _whole(found, "num_hidden_layers", where),
        "heads": _whole(found, "num_attention_heads", where),
        "feed_forward": int(width * found["mlp_ratio"]) if dinov2 else _whole(found, "intermediate_size", where),
        "activation": found["hidden_act"],
        "norm_eps": float(found["layer_norm_eps"]),
        "registers": found.get("num_register_tokens", 0) if dinov2 else 0,
        "position_HW": position_HW,
        "ragged": "num_patches" in DEFAULTS[kind],
        **_KINDS[kind],
    }


def _vision(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """(model_type of the tower, its fields)."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} holds {type(config).__name__}, no table of fields.")
    outer = config.get("model_type")
    kind, said = outer, config
    if outer in _OUTER:
        said = config.get("vision_config")
        if not isinstance(said, Mapping):
            raise ValueError(
                f"{where}: model_type={outer!r} without a vision_config; read the tower from its own checkpoint's folder."
            )
        kind = said.get("model_type", _OUTER[outer])
    if kind not in DEFAULTS:
        raise ValueError(
            f"{where}: model_type={kind!r} is no tower that is computed here; known are {', '.join(DEFAULTS)}, and "
            f"{', '.join(_OUTER)} with one of them as their vision_config."
        )
    return str(kind), said


def _features(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Where a LLaVA reads its tower: hidden states count from the embeddings, and the last one is not normed."""
    if config["model_type"] not in ("llava", "llava_next"):
        return {}
    kind, said = _vision(config, where)
    layer = config.get("vision_feature_layer", -2)
    layers = said.get("num_hidden_layers", DEFAULTS[kind]["num_hidden_layers"])
    if not isinstance(layer, int):
        raise ValueError(
            f"{where}: vision_feature_layer={layer} reads several layers; VitConfig.levels hands them over to a compressor."
        )
    layer = layer if layer < 0 else layer - layers - 1
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    found: dict[str, Any] = {"feature_layer": layer, "keep_class": whole and _KINDS[kind]["class_token"]}
    return found | ({"post_norm": False} if layer == -1 else {})


def _pixels(folder: Path) -> Pixels:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            return from_preprocessor(_read(folder / name))
    raise ValueError(
        f"{folder} holds no preprocessor_config.json; fetch it too, or say how the tower wants its images: "
        f"tower({str(folder)!r}, pixels=Pixels(...))."
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a downloaded checkpoint is a folder with config.json and safetensors."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again.") from error


def _whole(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config[key]
    if isinstance(value, list) and len(set(value)) == 1:  # [224, 224]
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key}={config[key]!r} must be a whole number of at least 1.")
    return value
