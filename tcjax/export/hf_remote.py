"""A Hugging Face directory with code: Llava whose projector is the compressor's own PyTorch twin. Holds any compressor.

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)     generate, and a processor with exactly
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)                   Q placeholders per image

A compressor that is told the question finds it in the prompt, between the template's marks of user and assistant.
The code is configuration_tcjax_llava.py and modeling_tcjax_llava.py (a small subclass of transformers' Llava) beside
modeling_compressor.py, the file every artifact carries. transformers converts no names for remote code, so the tensors have
the names of its memory layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import Compressed, Context
from tcjax.config import Run
from tcjax.export import hf_chat, hf_folder, hosts, origin
from tcjax.export.families import twin_source
from tcjax.towers.vit import VitConfig
from tcjax.vlm import Vlm, VlmConfig

KIND = "Hugging Face directory with code"
NAME = "TcjaxLlavaForConditionalGeneration"
CODE = ("configuration_tcjax_llava.py", "modeling_tcjax_llava.py")


def why_not(run: Run) -> str:
    if reason := origin.why_not(run):
        return reason
    config, facts = run.model, origin.facts(run)
    assert isinstance(config, VlmConfig)
    if facts["frames"] != 1:
        return f"Llava reads images, not videos of {facts['frames']} frames"
    lacking = sorted(set(facts["needs"]) - {"levels", "text"})
    if lacking:
        return f"the compressor needs {', '.join(lacking)}, which Llava does not hand to its projector"
    if reason := hf_chat.why_not(run, told="text" in facts["needs"]):
        return reason
    if reason := hosts.why_no_tower(config.seen, after_norm=True) or hosts.why_no_llm(config.llm):
        return reason
    if _chooses(config):
        return "it decides per image how many of its tokens are valid; a prompt has a fixed number of placeholders"
    return ""


def export(run: Run, model: Vlm, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()) -> Path:
    config, facts = run.model, origin.facts(run)
    assert isinstance(config, VlmConfig)
    chat = hf_chat.chat_of(run, root)
    ids, tower = hf_chat.token_ids(chat), config.one_tower
    compressor = hosts.compressor_tensors(model.compressor, config.compressor, config.widths)
    weights = {f"model.multi_modal_projector.{key}": tensor for key, tensor in compressor.items()}
    weights |= {f"model.vision_tower.{key}": tensor for key, tensor in _tower(model, tower, root).items()}
    for key, tensor in hosts.llm_tensors(model.llm, config.llm).items():
        weights[key if key == "lm_head.weight" else f"model.language_model.{key.removeprefix('model.')}"] = tensor
    outer = {
        "architectures": [NAME],
        "model_type": "tcjax_llava",
        "auto_map": {
            "AutoConfig": "configuration_tcjax_llava.TcjaxLlavaConfig",
            "AutoModelForImageTextToText": f"modeling_tcjax_llava.{NAME}",
        },
        "compressor": facts,
        "vision_levels": list(tower.levels),
        "question_marks": {
            "user": list(chat.encode(chat.template.user)),
            "assistant": [*chat.encode(chat.template.close), *chat.encode(chat.template.assistant)],
        },
        "vision_config": hosts.tower_config(tower),
        "text_config": hosts.llm_config(config.llm, ids),
        "image_token_index": chat.image_id,
        "image_seq_length": facts["num_queries"],
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": hosts.select_strategy(tower),
        "tie_word_embeddings": config.llm.tie,
        "dtype": "float32",
        **ids,
    }
    twin = twin_source(facts)
    code = {name: (hf_folder.TEMPLATES / name).read_text() for name in CODE}
    # transformers takes equal config files in folders of equal names for one class, and then one model class for both.
    digest = hashlib.sha256("".join([*code.values(), twin]).encode()).hexdigest()
    code = {name: f"{text}\n# SHA-256 of all code in this folder: {digest}\n" for name, text in code.items()}
    code["modeling_compressor.py"] = twin
    about = f"A vision-language model trained with tcjax: Llava with a {facts['family']} compressor as its projector."
    return hf_folder.write(KIND, outer, weights, run, model, identity, out=out, root=root, code=code, about=about)


def _tower(model: Vlm, tower: VitConfig, root: Path) -> dict[str, Any]:
    found = hosts.tower_tensors(model.tower, tower, root)
    return {key.removeprefix("vision_model."): tensor for key, tensor in found.items()}


def _chooses(config: VlmConfig) -> bool:
    """Whether outputs can be invalid although every input is valid."""
    compressor, widths = config.compressor, config.widths

    def answer(tokens_BNC: jax.Array, levels_BNE: jax.Array, text_BTD: jax.Array) -> Compressed:
        context = Context(levels_BNE=levels_BNE, text_BTD=text_BTD)
        return compressor.build(widths, nnx.Rngs(0))(tokens_BNC, context)  # pyright: ignore[reportAttributeAccessIssue]

    N, C = widths.num_tokens, widths.vision_C
    shapes = (1, N, C), (1, N, widths.levels * C), (1, 4, widths.text_D)
    return jax.eval_shape(answer, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).valid_BQ is not None
