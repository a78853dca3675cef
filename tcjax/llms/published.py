"""A downloaded checkpoint's config.json as an LlmConfig and back, and where its LLM's tensors lie.

    llm("checkpoints/vicuna-7b-v1.5")         model_type llama, mistral, qwen2 or qwen3; of a LLaVA folder its text_config
    disagreements(cfg, config)                {field: (there, here)}, what a loader refuses
    to_json(cfg)                              what transformers builds the same decoder from

A field that config.json leaves out has the default of its published class, as it has for whoever wrote the file: LLaVA's
text_config says four of fifteen. Both spellings of the rotary fields are read: `rope_theta` with `rope_scaling`, and the
`rope_parameters` of transformers 5. What the decoder does not compute is refused by its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcjax.interop.prefixes import Layout
from tcjax.llms.decoder import LlmConfig
from tcjax.llms.rope import LinearScaling, Llama3Scaling, Scaling, YarnScaling, grown

# Where the LLM's tensors lie on disk, and the one by which it is known (tcjax.interop.prefixes).
SIGN = "model.embed_tokens.weight"
LAYOUTS = (
    Layout("language model", {"": ""}, others=("model.mm_projector.", "model.vision_tower.", "model.image_newline")),
    Layout(
        "LLaVA",
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        others=("vision_tower.", "multi_modal_projector.", "image_newline"),
    ),
    Layout(
        "LLaVA in transformers' memory",
        {"model.": "model.language_model.", "lm_head.": "lm_head."},
        others=("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"),
    ),
)

_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
_QWEN = _LLAMA | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
_ALIASES = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}  # LLaVA's own repository
_NEUTRAL: dict[str, tuple] = {  # fields of relatives, with the values at which they do nothing
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "quantization_config": (None,),
}


def llm(folder: str | Path, *, root: Path = Path(), **changes: Any) -> LlmConfig:
    """The LLM of a downloaded checkpoint, its weights the folder itself.

    Args:
        folder: holds config.json and safetensors; below `root`, as every path of a config is below the project's root.
        changes: fields of LlmConfig to have otherwise than config.json says.

    Raises:
        ValueError: no config.json, one of another architecture, or one that asks for what the decoder does not compute.
    """
    path = root / folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a downloaded checkpoint is a folder with config.json and safetensors."
        )
    return dataclasses.replace(of_json(_read(path), str(path)), **{"weights": str(folder), **changes})


def check(folder: Path, cfg: LlmConfig) -> None:
    """ValueError naming every difference if a config.json lies in the weights' folder and says something else than cfg."""
    path = folder / "config.json"
    if path.is_file() and (wrong := disagreements(cfg, _read(path), str(path))):
        lines = "".join(f"\n  {name}: {there!r} there, {here!r} asked for" for name, (there, here) in wrong.items())
        raise ValueError(
            f"{path} describes another LLM than the one that is asked for:{lines}\n"
            "Read the config from the folder (tcjax.llms.published.llm), or fetch the checkpoint that was meant."
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again.") from error


def of_json(config: Mapping[str, Any], where: str = "config.json") -> LlmConfig:
    """A parsed config.json, without weights; `where` is for messages."""
    outer, config = config, _text(config, where)
    kind = _kind(config, where)
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            raise ValueError(
                f"{where}: {key}={config[key]!r} is not computed here, only {' or '.join(map(repr, neutral))}; "
                f"take a checkpoint without it."
            )
    said = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    found = DEFAULTS[kind] | said
    heads, width = _whole(found, "num_attention_heads", where), _whole(found, "hidden_size", where)
    if "head_dim" not in found and width % heads:
        raise ValueError(
            f"{where}: no head_dim, and hidden_size={width} is no multiple of num_attention_heads={heads}."
        )
    theta, scaling = _rope(found, where)
    biases = kind in ("llama", "qwen3") and bool(found.get("attention_bias"))
    return LlmConfig(
        vocab=_whole(found, "vocab_size", where),
        width=width,
        layers=_whole(found, "num_hidden_layers", where),
        heads=heads,
        kv_heads=_whole({"num_key_value_heads": heads} | found, "num_key_value_heads", where),
        head_width=_whole({"head_dim": width // heads} | found, "head_dim", where),
        feed_forward=_whole(found, "intermediate_size", where),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(found, "rms_norm_eps", where),
        tie=bool(found.get("tie_word_embeddings") or outer.get("tie_word_embeddings")),
        qkv_bias=kind == "qwen2" or biases,
        out_bias=biases,
        mlp_bias=kind == "llama" and bool(found.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        window=_window(kind, found, where),
    )


def disagreements(cfg: LlmConfig, config: Mapping[str, Any], where: str = "config.json") -> dict[str, tuple[Any, Any]]:
    """{field: (what config.json says, what cfg says)} of every field in which they differ; {} if they agree."""
    found = of_json(config, where)
    fields = [field.name for field in dataclasses.fields(LlmConfig) if field.name != "weights"]
    pairs = {name: (getattr(found, name), getattr(cfg, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def to_json(cfg: LlmConfig) -> dict[str, Any]:
    """The fields of config.json that make the published class compute this decoder, in the spelling of files on the hub.

    Raises:
        ValueError: no published class computes it.
    """
    if reason := why_unpublished(cfg):
        raise ValueError(reason)
    kind = model_type(cfg)
    slides = {
        "mistral": {"sliding_window": cfg.window},
        "qwen2": {"use_sliding_window": cfg.window is not None, "sliding_window": cfg.window, "max_window_layers": 0},
    }
    return {
        "model_type": kind,
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.feed_forward,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _scaling_json(cfg.rope_scaling),
        "tie_word_embeddings": cfg.tie,
        **({"attention_bias": cfg.out_bias} if kind in ("llama", "qwen3") else {}),
        **({"mlp_bias": cfg.mlp_bias} if kind == "llama" else {}),
        **(slides.get("qwen2" if kind == "qwen3" else kind, {})),
    }


def model_type(cfg: LlmConfig) -> str:
    """The published class of this decoder."""
    if cfg.qk_norm:
        return "qwen3"
    if cfg.qkv_bias and not cfg.out_bias:
        return "qwen2"
    return "llama" if cfg.window is None else "mistral"


def why_unpublished(cfg: LlmConfig) -> str:
    """Why no published class computes this decoder; "" if one does."""
    kind = model_type(cfg)
    if kind != "qwen2" and cfg.qkv_bias != cfg.out_bias:
        return f"no published decoder of {kind}'s kind has biases on q, k, v or on the output alone"
    if cfg.mlp_bias and kind != "llama":
        return f"no published decoder of {kind}'s kind has biases in its feed-forward"
    if kind == "mistral" and cfg.qkv_bias:
        return "no published decoder has a sliding window, and biases on q, k, v and the output"
    return ""


def _text(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The language model's part of a vision-language model's config; the config itself of a language model."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} holds {type(config).__name__}, no table of fields.")
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _kind(config: Mapping[str, Any], where: str) -> str:
    said = config.get("model_type")
    kind = _ALIASES.get(str(said), said)
    if kind not in DEFAULTS:
        raise ValueError(
            f"{where}: model_type={said!r} is not computed here; known are {', '.join([*DEFAULTS, *_ALIASES])}, and models "
            f"with one of them as their text_config."
        )
    return str(kind)


def _window(kind: str, config: Mapping[str, Any], where: str) -> int | None:
    """Of every layer; a model whose layers differ is refused."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window")
    if kind == "llama" or window is None or (kind != "mistral" and not config.get("use_sliding_window")):
        return None
    if kind == "mistral":
        return _whole(config, "sliding_window", where)
    types = config.get("layer_types") or [
        "sliding_attention" if layer >= config["max_window_layers"] else "full_attention" for layer in range(layers)
    ]
    if len(set(types)) > 1:
        raise ValueError(
            f"{where}: {types.count('sliding_attention')} of {layers} layers have a sliding window; either all or none can. "
            f'Without long contexts, set "use_sliding_window": false.'
        )
    return _whole(config, "sliding_window", where) if types[0] == "sliding_attention" else None


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, Scaling | None]:
    """Base and scaling, from either spelling."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise ValueError(f"{where}: rope_scaling={old} and rope_parameters={new} differ; keep one.")
    said: Mapping[str, Any] = old or new or {}
    if any(isinstance(value, Mapping) for value in said.values()):
        raise ValueError(f"{where}: {sorted(said)} have rotary positions of their own; all layers share one kind here.")
    if said.get("partial_rotary_factor") not in _NEUTRAL["partial_rotary_factor"]:
        raise ValueError(
            f"{where}: partial_rotary_factor={said['partial_rotary_factor']} is not computed here: every head turns whole."
        )
    theta = _number({"rope_theta": config.get("rope_theta", 1e4)} | dict(said), "rope_theta", where)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "dynamic":
        raise ValueError(
            f"{where}: rope type 'dynamic' follows the length of each batch, which a cache of turned keys cannot. Up to "
            f"max_position_embeddings={config['max_position_embeddings']} it is no scaling: take it out of config.json."
        )
    if kind not in _SCALINGS:
        raise ValueError(f"{where}: rope type {kind!r} is not computed here; known are {', '.join(_SCALINGS)}.")
    said = {"original_max_position_embeddings": config["max_position_embeddings"]} | dict(said)
    return theta, _SCALINGS[kind](said, where)


def _linear(said: Mapping[str, Any], where: str) -> Scaling:
    return LinearScaling(factor=_number(said, "factor", where))


def _llama3(said: Mapping[str, Any], where: str) -> Scaling:
    return Llama3Scaling(
        factor=_number(said, "factor", where),
        low=_number(said, "low_freq_factor", where),
        high=_number(said, "high_freq_factor", where),
        original=_whole(said, "original_max_position_embeddings", where),
    )


def _yarn(said: Mapping[str, Any], where: str) -> Scaling:
    factor, attention = _number(said, "factor", where), said.get("attention_factor")
    if attention is None and said.get("mscale") and said.get("mscale_all_dim"):
        attention = grown(factor, said["mscale"]) / grown(factor, said["mscale_all_dim"])
    return YarnScaling(
        factor=factor,
        original=_whole(said, "original_max_position_embeddings", where),
        attention=None if attention is None or math.isclose(attention, grown(factor)) else float(attention),
        fast=float(said.get("beta_fast") or 32),
        slow=float(said.get("beta_slow") or 1),
        truncate=bool(said.get("truncate", True)),
    )


_SCALINGS = {"default": lambda said, where: None, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _scaling_json(scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original,
        "beta_fast": scaling.fast,
        "beta_slow": scaling.slow,
        "truncate": scaling.truncate,
        **({} if scaling.attention is None else {"attention_factor": scaling.attention}),
    }


def _whole(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key}={value!r} is no whole number.")
    return value


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key}={value!r} is no number.")
    return float(value)
