"""The config of a published connector from the shapes of its tensors, under the family's own names, and config.json.

What shapes cannot say (heads, an eps) is read from config.json or is the publisher's one value; what config.json says and
the family does not compute is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

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
from tcjax.compressors.base import CompressorConfig
from tcjax.interop.names import Shapes


class Found(NamedTuple):
    """config, given the number of tokens N. llm_D: None if the checkpoint has no layer to an LLM."""

    config: Callable[[int], CompressorConfig]
    vision_C: int
    llm_D: int | None


def number(shapes: Shapes, pattern: str) -> int:
    """How many different first numbers the names have that `pattern` matches, such as layers."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def shape(shapes: Shapes, key: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that the config is read from; ValueError if it has another rank."""
    if len(shapes.get(key, ())) != rank:
        raise ValueError(f"{key} has the shape {list(shapes.get(key, ()))}; {rank} axes were expected.")
    return shapes[key]


def only(config: dict[str, Any], field: str, value: Any) -> None:
    """ValueError if config.json says something else than what this compressor computes."""
    if field in config and config[field] != value:
        raise ValueError(f"config.json says {field}={config[field]!r}; only {value!r} is what this family computes.")


def of_mlp(shapes: Shapes, config: dict) -> Found:
    only(config, "projector_hidden_act", "gelu")
    D, C = shape(shapes, "0.weight", 2)
    return Found(lambda N: mlp.Config(depth=number(shapes, r"(\d+)\.weight")), C, D)


def of_internvl(shapes: Shapes, config: dict) -> Found:
    only(config, "projector_hidden_act", "gelu")
    factor = round(1 / config.get("downsample_ratio", 0.5))
    D, E = shape(shapes, "mlp1.1.weight", 2)
    return Found(lambda N: pixel_shuffle.Config(num_queries=N // factor**2, head="mlp"), E // factor**2, D)


def of_idefics3(shapes: Shapes, config: dict) -> Found:
    factor = config.get("scale_factor", 2)
    D, E = shape(shapes, "modality_projection.proj.weight", 2)
    return Found(lambda N: pixel_shuffle.Config(num_queries=N // factor**2), E // factor**2, D)


def of_idefics2(shapes: Shapes, config: dict) -> Found:
    perceiver, text = config.get("perceiver_config") or {}, config.get("text_config") or {}
    Q, D = shape(shapes, "perceiver_resampler.latents", 2)
    projection, C = shape(shapes, "modality_projection.gate_proj.weight", 2)
    head_width = perceiver.get("resampler_head_dim", 96)
    layer = "perceiver_resampler.layers.0."
    # transformers takes the LLM's eps where the block does not say its own width.
    eps = text.get("rms_norm_eps", 1e-5) if perceiver.get("hidden_size", 4096) != D else 1e-6
    only(perceiver, "hidden_act", "silu")
    found = idefics2_resampler.Config(
        num_queries=Q,
        depth=number(shapes, r"perceiver_resampler\.layers\.(\d+)\."),
        heads=shape(shapes, f"{layer}self_attn.q_proj.weight", 2)[0] // head_width,
        kv_heads=shape(shapes, f"{layer}self_attn.k_proj.weight", 2)[0] // head_width,
        head_width=head_width,
        ff_mult=shape(shapes, f"{layer}mlp.up_proj.weight", 2)[0] // D,
        projection=projection,
        eps=perceiver.get("rms_norm_eps", eps),
    )
    return Found(lambda N: found, C, D)


def of_openflamingo(shapes: Shapes, config: dict) -> Found:
    Q, C = shape(shapes, "latents", 2)
    heads = 8  # OpenFlamingo's, at 64 channels each
    found = resampler.Config(
        num_queries=Q,
        depth=number(shapes, r"layers\.(\d+)\."),
        heads=heads,
        head_width=shape(shapes, "layers.0.0.to_q.weight", 2)[0] // heads,
        ff_mult=shape(shapes, "layers.0.1.1.weight", 2)[0] // C,
        max_frames=shapes["frame_embs"][0] if "frame_embs" in shapes else 0,
        max_media=shapes["media_time_embs"][0] if "media_time_embs" in shapes else 0,
    )
    return Found(lambda N: found, C, None)


def of_qformer(shapes: Shapes, config: dict) -> Found:
    block = config.get("qformer_config") or {}
    only(block, "hidden_act", "gelu")
    only(block, "layer_norm_eps", 1e-12)
    _, Q, E = shape(shapes, "query_tokens", 3)
    layer = r"qformer\.encoder\.layer\.(\d+)\."
    depth, crossing = number(shapes, layer), number(shapes, layer + "crossattention")
    positions = shapes.get("qformer.embeddings.position_embeddings.weight")
    found = qformer.Config(
        num_queries=Q,
        depth=depth,
        width=E,
        heads=block.get("num_attention_heads", max(E // 64, 1)),
        feed_forward=shape(shapes, "qformer.encoder.layer.0.intermediate_query.dense.weight", 2)[0],
        cross_every=-(-depth // max(crossing, 1)),
        class_token=True,  # of everything published
        text=positions is not None,
        **({} if positions is None else {"max_text": positions[0]}),
    )
    C = shape(shapes, "qformer.encoder.layer.0.crossattention.attention.key.weight", 2)[1]
    projection = shapes.get("language_projection.weight")
    return Found(lambda N: found, C, None if projection is None else projection[0])


def of_honeybee(shapes: Shapes, config: dict) -> Found:
    block = config.get("projector_config") or config
    if "num_query_tokens" not in block:
        raise ValueError("a C-Abstractor has no weight that knows its number of tokens; --queries says it.")
    stages = {key: rows for key, rows in shapes.items() if key.startswith("net.0.")}
    linears = [key for key in shapes if re.fullmatch(r"readout\.\d+\.weight", key)]
    last = max(linears, key=lambda key: int(key.split(".")[1]), default="readout.0.weight")
    found = c_abstractor.Config(
        num_queries=block["num_query_tokens"],
        depth=number(stages, r"net\.0\.b(\d+)\."),
        hidden=shape(shapes, "net.0.b1.conv1.conv.weight", 4)[0] if stages else c_abstractor.Config.hidden,
        mlp_depth=len(linears),
        pos_emb="pos_emb" in shapes,
        prenorm="prenorm.weight" in shapes,
    )
    first = shape(shapes, "net.0.b1.conv1.conv.weight", 4)[1] if stages else shape(shapes, "readout.0.weight", 2)[1]
    return Found(lambda N: found, first, shape(shapes, last, 2)[0])


def of_sincos(form: str) -> Callable[[Shapes, dict[str, Any]], Found]:
    """Qwen-VL, MiniCPM-V, LLaVA-UHD: one cross-attention of heads 128 wide."""

    def infer(shapes: Shapes, config: dict) -> Found:
        is_video = form == "minicpm_v25" and config.get("batch_3d_resampler", False)
        named = "omnilmm" if config.get("model_type") == "omnilmm" else "minicpm_v45" if is_video else form
        before = "attn_pool." if form == "qwen_vl" else ""
        Q, D = shape(shapes, f"{before}query", 2)
        found = qwen_resampler.Config(num_queries=Q, form=named)
        return Found(lambda N: found, shapes.get(f"{before}kv_proj.weight", (D, D))[1], D)

    return infer


def of_uhd_v1(shapes: Shapes, config: dict) -> Found:
    Q, D = shape(shapes, "query", 2)
    found = spatial_resampler.Config(num_queries=Q)
    return Found(lambda N: found, shapes.get("kv_proj.weight", (D, D))[1], D)


def of_mqt(shapes: Shapes, config: dict) -> Found:
    C, D = shape(shapes, "proj", 2)
    found = matryoshka_query.Config(num_queries=shape(shapes, "query", 2)[0], max_queries=shapes["query"][0])
    return Found(lambda N: found, C, D)
