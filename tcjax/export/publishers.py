"""Who publishes which connector, and how: one row per layout of a checkpoint.

A row's `prefix` says where the connector lies in a whole model's names, `marks` are the tensors by which the layout is
known, `renames` turn the rest of a name into the family's own published one. What a config holds is inferred from the
tensors' shapes and, where shapes cannot say it, from config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tcjax.compressors import idefics2_resampler, mlp, pixel_shuffle, qformer, resampler
from tcjax.compressors.base import CompressorConfig
from tcjax.interop.lavis import to_hugging_face
from tcjax.interop.names import Shapes


class Found(NamedTuple):
    """config, given the number of tokens N. llm_D: None if the checkpoint has no layer to an LLM."""

    config: Callable[[int], CompressorConfig]
    vision_C: int
    llm_D: int | None


class Publisher(NamedTuple):
    """without: patterns of tensors that another layout with the same marks has.

    fresh: patterns of the family's tensors that this publisher has not; they start as a new compressor's do.
    ignore: patterns of the publisher's tensors that the family has no use for.
    """

    name: str
    family: str
    prefix: str
    marks: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] | Callable[[Iterable[str]], dict[str, str]]
    infer: Callable[[Shapes, dict[str, Any]], Found]
    without: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Name in the checkpoint -> the family's own, for everything behind the prefix."""
        if callable(self.renames):
            return self.renames(names)
        found = {}
        for name in names:
            inside = re.match(self.prefix, name)
            if inside:
                key = name[inside.end() :]
                for pattern, replacement in self.renames:
                    key = re.sub(pattern, replacement, key)
                found[name] = key
        return found

    def is_in(self, names: Iterable[str]) -> bool:
        inside = {name[match.end() :] for name in names if (match := re.match(self.prefix, name))}

        def has(mark: str) -> bool:
            return any(re.fullmatch(mark, key) for key in inside)

        return all(map(has, self.marks)) and not any(map(has, self.without))


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


def _mlp(shapes: Shapes, config: dict) -> Found:
    only(config, "projector_hidden_act", "gelu")
    D, C = shape(shapes, "0.weight", 2)
    return Found(lambda N: mlp.Config(depth=number(shapes, r"(\d+)\.weight")), C, D)


def _internvl(shapes: Shapes, config: dict) -> Found:
    only(config, "projector_hidden_act", "gelu")
    factor = round(1 / config.get("downsample_ratio", 0.5))
    D, E = shape(shapes, "mlp1.1.weight", 2)
    return Found(lambda N: pixel_shuffle.Config(num_queries=N // factor**2, head="mlp"), E // factor**2, D)


def _idefics3(shapes: Shapes, config: dict) -> Found:
    factor = config.get("scale_factor", 2)
    D, E = shape(shapes, "modality_projection.proj.weight", 2)
    return Found(lambda N: pixel_shuffle.Config(num_queries=N // factor**2), E // factor**2, D)


def _idefics2(shapes: Shapes, config: dict) -> Found:
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


def _openflamingo(shapes: Shapes, config: dict) -> Found:
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


def _qformer(shapes: Shapes, config: dict) -> Found:
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
        text=positions is not None,
        **({} if positions is None else {"max_text": positions[0]}),
    )
    C = shape(shapes, "qformer.encoder.layer.0.crossattention.attention.key.weight", 2)[1]
    projection = shapes.get("language_projection.weight")
    return Found(lambda N: found, C, None if projection is None else projection[0])


def _lavis(names: Iterable[str]) -> dict[str, str]:
    """Text embeddings beside a projection to an LLM are InstructBLIP's; the first stage has them and no LLM."""
    names = list(names)
    text = any(re.match(r"Qformer\.bert\.embeddings\.position_embeddings", name) for name in names)
    text = text and any(re.match(r"(opt|t5|llm)_proj\.", name) for name in names)
    renamed = to_hugging_face({name: name for name in names}, text=text)  # pyright: ignore[reportArgumentType]
    return {old: new for new, old in renamed.compressor.items()}  # pyright: ignore[reportReturnType]


PUBLISHERS = (
    Publisher(
        "LLaVA",
        "mlp",
        r"(?:base_model\.)?(?:model\.)*mm_projector\.",
        (r"(?:0\.)?weight",),
        ((r"^(weight|bias)$", r"0.\1"),),
        _mlp,
    ),
    Publisher(
        "LLaVA in transformers",
        "mlp",
        r"(?:model\.)?multi_modal_projector\.",
        (r"linear_1\.weight", r"linear_2\.weight"),
        ((r"^linear_1\.", "0."), (r"^linear_2\.", "2.")),
        _mlp,
        without=(r"layer_norm\.weight",),
    ),
    Publisher(
        "InternVL",
        "pixel_shuffle",
        r"(?:model\.)?(?=mlp1\.)",
        (r"mlp1\.0\.weight", r"mlp1\.1\.weight", r"mlp1\.3\.weight"),
        (),
        _internvl,
    ),
    Publisher(
        "InternVL in transformers",
        "pixel_shuffle",
        r"(?:model\.)?multi_modal_projector\.",
        (r"layer_norm\.weight", r"linear_1\.weight", r"linear_2\.weight"),
        ((r"^layer_norm\.", "mlp1.0."), (r"^linear_1\.", "mlp1.1."), (r"^linear_2\.", "mlp1.3.")),
        _internvl,
    ),
    Publisher(
        "Idefics3",
        "pixel_shuffle",
        r"(?:model\.)?connector\.",
        (r"modality_projection\.proj\.weight",),
        (),
        _idefics3,
    ),
    Publisher(
        "Idefics2",
        "idefics2_resampler",
        r"(?:model\.)?connector\.",
        (r"perceiver_resampler\.latents", r"modality_projection\.gate_proj\.weight"),
        (),
        _idefics2,
    ),
    Publisher(
        "OpenFlamingo",
        "resampler",
        r"(?:module\.)?perceiver\.",
        (r"latents", r"layers\.0\.0\.to_kv\.weight"),
        (),
        _openflamingo,
        fresh=(r"out_proj\.(weight|bias)",),
    ),
    Publisher(
        "BLIP-2 or InstructBLIP in transformers",
        "qformer",
        r"(?:model\.)?(?=query_tokens$|qformer\.|language_projection\.)",
        (r"query_tokens", r"qformer\.(embeddings\.)?layernorm\.weight"),
        (),
        _qformer,
        fresh=(r"text_proj\.(weight|bias)",),
        ignore=(r"qformer\.embeddings\.(position_ids|word_embeddings\.weight)",),  # words are embedded by the LLM,
    ),
    Publisher(
        "BLIP-2 or InstructBLIP in LAVIS",
        "qformer",
        r"",
        (r"query_tokens", r"Qformer\.bert\.embeddings\.LayerNorm\.weight"),
        _lavis,
        _qformer,
        fresh=(r"text_proj\.(weight|bias)", r"language_projection\.(weight|bias)"),
    ),
)
