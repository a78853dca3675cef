"""Who publishes which connector, and how: one row per layout of a checkpoint.

A row's `prefix` says where the connector lies in a whole model's names, `marks` are the tensors by which the layout is
known, `renames` turn the rest of a name into the family's own published one, and `infer` finds the config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tcjax.export import inferred
from tcjax.export.inferred import Found
from tcjax.interop.lavis import to_hugging_face
from tcjax.interop.names import Shapes


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
        inferred.of_mlp,
    ),
    Publisher(
        "LLaVA in transformers",
        "mlp",
        r"(?:model\.)?multi_modal_projector\.",
        (r"linear_1\.weight", r"linear_2\.weight"),
        ((r"^linear_1\.", "0."), (r"^linear_2\.", "2.")),
        inferred.of_mlp,
        without=(r"layer_norm\.weight",),
    ),
    Publisher(
        "InternVL",
        "pixel_shuffle",
        r"(?:model\.)?(?=mlp1\.)",
        (r"mlp1\.0\.weight", r"mlp1\.1\.weight", r"mlp1\.3\.weight"),
        (),
        inferred.of_internvl,
    ),
    Publisher(
        "InternVL in transformers",
        "pixel_shuffle",
        r"(?:model\.)?multi_modal_projector\.",
        (r"layer_norm\.weight", r"linear_1\.weight", r"linear_2\.weight"),
        ((r"^layer_norm\.", "mlp1.0."), (r"^linear_1\.", "mlp1.1."), (r"^linear_2\.", "mlp1.3.")),
        inferred.of_internvl,
    ),
    Publisher(
        "Idefics3",
        "pixel_shuffle",
        r"(?:model\.)?connector\.",
        (r"modality_projection\.proj\.weight",),
        (),
        inferred.of_idefics3,
    ),
    Publisher(
        "Idefics2",
        "idefics2_resampler",
        r"(?:model\.)?connector\.",
        (r"perceiver_resampler\.latents", r"modality_projection\.gate_proj\.weight"),
        (),
        inferred.of_idefics2,
    ),
    Publisher(
        "OpenFlamingo",
        "resampler",
        r"(?:module\.)?perceiver\.",
        (r"latents", r"layers\.0\.0\.to_kv\.weight"),
        (),
        inferred.of_openflamingo,
        fresh=(r"out_proj\.(weight|bias)",),
    ),
    Publisher(
        "BLIP-2 or InstructBLIP in transformers",
        "qformer",
        r"(?:model\.)?(?=query_tokens$|qformer\.|language_projection\.)",
        (r"query_tokens", r"qformer\.(embeddings\.)?layernorm\.weight"),
        (),
        inferred.of_qformer,
        fresh=(r"text_proj\.(weight|bias)",),
        ignore=(r"qformer\.embeddings\.(position_ids|word_embeddings\.weight)",),  # words are embedded by the LLM,
    ),
    Publisher(
        "BLIP-2 or InstructBLIP in LAVIS",
        "qformer",
        r"",
        (r"query_tokens", r"Qformer\.bert\.embeddings\.LayerNorm\.weight"),
        _lavis,
        inferred.of_qformer,
        fresh=(r"text_proj\.(weight|bias)", r"language_projection\.(weight|bias)"),
    ),
    Publisher(
        "Honeybee",
        "c_abstractor",
        r"(?:model\.)?abstractor\.",
        (r"readout\.0\.weight",),
        (),
        inferred.of_honeybee,
        ignore=(r"eos_tokens",),
    ),
    Publisher(
        "Qwen-VL",
        "qwen_resampler",
        r"(?:transformer\.)?(?:visual\.)?(?=attn_pool\.|ln_post\.|proj$)",
        (r"attn_pool\.query", r"ln_post\.weight", r"proj"),
        (),
        inferred.of_sincos("qwen_vl"),
    ),
    Publisher(
        "MiniCPM-V 2.0 or OmniLMM",
        "qwen_resampler",
        r"(?:model\.)?resampler\.",
        (r"query", r"attn\.in_proj_weight", r"pos_embed"),
        (),
        inferred.of_sincos("minicpm_v2"),
    ),
    Publisher(
        "MiniCPM-V 2.5 to 4.5",
        "qwen_resampler",
        r"(?:model\.)?resampler\.",
        (r"query", r"attn\.in_proj_weight"),
        (),
        inferred.of_sincos("minicpm_v25"),
        without=(r"pos_embed",),
    ),
    Publisher(
        "LLaVA-UHD",
        "qwen_resampler",
        r"(?:model\.)*mm_projector\.",
        (r"query", r"attn\.in_proj_weight", r"ln_kv\.weight"),
        (),
        inferred.of_sincos("uhd"),
    ),
    Publisher(
        "LLaVA-UHD v1",
        "spatial_resampler",
        r"(?:model\.)*mm_projector\.",
        (r"query", r"attn\.in_proj_weight", r"ln_kv\.weight"),
        (),
        inferred.of_uhd_v1,
    ),
    Publisher(
        "MQT-LLaVA",
        "matryoshka_query",
        r"(?:model\.)*mm_projector\.",
        (r"query", r"ln_k\.weight", r"ln_v\.weight", r"proj"),
        (),
        inferred.of_mqt,
    ),
)
