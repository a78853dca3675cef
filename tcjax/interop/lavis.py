"""BLIP-2 and InstructBLIP checkpoints of LAVIS under the names of transformers' classes, which our tables know.

    Qformer.bert.                        -> qformer.
    attention.self., crossattention.self -> attention.attention., crossattention.attention
    Qformer.bert.embeddings.LayerNorm    -> qformer.layernorm (BLIP-2), qformer.embeddings.layernorm (InstructBLIP)
    opt_proj, t5_proj, llm_proj          -> language_projection
    ln_vision                            -> vision_model.post_layernorm, of the tower

What no compressor reads is left out and listed: the language modelling head (`Qformer.cls`), the heads of stage 1
(`vision_proj`, `text_proj`, `itm_head`, `temp`; this `text_proj` is not ours), the frozen models, and for BLIP-2 the
text's embeddings and feed-forwards. The layouts are the same, so nothing but names changes.
Mind the tower: LAVIS computes `ln_vision` with eps 1e-5, transformers' post_layernorm with 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from tcjax.interop.names import Arrays

_DROPPED = (
    r"Qformer\.cls\..*",
    r"Qformer\.bert\.embeddings\.position_ids",  # a buffer: 0, 1, 2, ...
    r"Qformer\.bert\.pooler\..*",
    r"(vision_proj|text_proj|itm_head)\..*|temp",
    r"(visual_encoder|opt_model|t5_model|llm_model)\..*",
)
_TEXT = (
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\..*",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
)
_RENAMES = (
    (r"^Qformer\.bert\.", "qformer."),
    (r"attention\.self\.", "attention.attention."),
    (r"^(opt|t5|llm)_proj\.", "language_projection."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
)
_NEIGHBOURS = r"vision_model\..*|qformer\.embeddings\.word_embeddings\..*"


class Renamed(NamedTuple):
    """compressor: what its table asks for. neighbours: the tower's last norm, and with text BERT's word embeddings,
    which embed the instruction outside. dropped: LAVIS names that were left out. A name nobody knows stays as it is in
    `compressor`, so that the table's own error lists it."""

    compressor: Arrays
    neighbours: Arrays
    dropped: list[str]


def to_hugging_face(tensors: Mapping, *, text: bool) -> Renamed:
    """A LAVIS checkpoint (its "model" entry) under transformers' names.

    Args:
        text: whether the compressor is conditioned on it: InstructBLIP's layout, else BLIP-2's.

    Raises:
        ValueError: two tensors get the same name, as of a checkpoint with projections to two LLMs.
    """
    unwanted = re.compile("|".join(f"(?:{pattern})" for pattern in (*_DROPPED, *(() if text else _TEXT))))
    renamed = Renamed({}, {}, [])
    for key, tensor in tensors.items():
        if unwanted.fullmatch(key):
            renamed.dropped.append(key)
            continue
        name = _name(key, text)
        part = renamed.neighbours if re.fullmatch(_NEIGHBOURS, name) else renamed.compressor
        if name in part:
            raise ValueError(f"{key} would be a second {name}; keep one of the two in the file.")
        part[name] = tensor
    return renamed


def is_lavis(names: Mapping) -> bool:
    """Whether a checkpoint has LAVIS's names."""
    return any(name.startswith("Qformer.") for name in names)


def _name(key: str, text: bool) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key.replace("qformer.embeddings.LayerNorm", "qformer.embeddings.layernorm" if text else "qformer.layernorm")
