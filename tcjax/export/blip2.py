"""The Q-Former's stock classes: BLIP-2, and InstructBLIP where it is told the question.

Both read every token of their tower behind its last norm, the class token first. InstructBLIP embeds the question with a
table of its own, ours is the LLM's, mapped by `text_proj` where the widths differ; a map of a table is a table:

    word_embeddings = E_llm W + b        so that qformer_input_ids are the question's ids in the LLM's vocabulary

Dropout is 0, as in our training (published 0.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tcjax.export import hosts, stock
from tcjax.export.stock import Host
from tcjax.interop import names
from tcjax.towers.vit import VitConfig
from tcjax.vlm import VlmConfig

_LLM = "language_model.model."


def tower_tensors(found: names.Arrays, cfg: VitConfig) -> names.Arrays:
    """The tensors of `hosts.tower_tensors` under BLIP-2's names: one matrix for q, k and v, tables with a batch axis."""
    renamed = {key.replace(".self_attn.out_proj.", ".self_attn.projection."): tensor for key, tensor in found.items()}
    tables = "vision_model.embeddings."
    renamed[f"{tables}class_embedding"] = renamed[f"{tables}class_embedding"].reshape(1, 1, -1)
    renamed[f"{tables}position_embedding"] = renamed.pop(f"{tables}position_embedding.weight")[None]
    for layer in range(cfg.layers):
        attention = f"vision_model.encoder.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            each = [renamed.pop(f"{attention}{name}_proj.{kind}") for name in "qkv"]
            renamed[f"{attention}qkv.{kind}"] = np.concatenate(each)
    return renamed


def _vision(tower: VitConfig) -> dict[str, Any]:
    return {"model_type": "blip_2_vision_model", **hosts.tower_sizes(tower), "qkv_bias": True}


def _why_not(facts: dict, config: VlmConfig) -> str:
    if "extra" not in facts:
        return "it reads the tower's class token too; train with qformer.Config(class_token=True)"
    return hosts.why_not_behind_norm(config.one_tower) or stock.why_not_all_queries(facts, "queries")


def _config(facts: dict, config: VlmConfig) -> dict[str, Any]:
    told = {"vocab_size": config.llm.vocab, "max_position_embeddings": facts["max_text"]}
    return {
        "num_query_tokens": facts["num_queries"],
        "qformer_config": {
            "hidden_size": facts["width"],
            "num_hidden_layers": facts["depth"],
            "num_attention_heads": facts["heads"],
            "intermediate_size": facts["feed_forward"],
            "hidden_act": facts["activation"],
            "layer_norm_eps": facts["norm_eps"],
            "cross_attention_frequency": facts["cross_every"],
            "encoder_hidden_size": facts["vision_width"],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **(told if facts["text"] else {"use_qformer_text_input": False}),
        },
    }


def _with_words(weights: names.Arrays) -> names.Arrays:
    """`text_proj` becomes the table of words; where there is none, the table is the LLM's."""
    table_VE = weights[f"{_LLM}embed_tokens.weight"]
    if "text_proj.weight" in weights:
        table_VE = table_VE @ weights["text_proj.weight"].T + weights["text_proj.bias"]
    kept = {key: tensor for key, tensor in weights.items() if not key.startswith("text_proj.")}
    return kept | {"qformer.embeddings.word_embeddings.weight": table_VE}


BLIP2 = Host(
    name="Blip2ForConditionalGeneration",
    model_type="blip-2",
    after_norm=True,
    why_not=_why_not,
    config=_config,
    key=lambda key: key,
    tower="",
    llm=_LLM,
    head="language_model.lm_head.weight",
    image_token="image_token_index",
    towers=("EVA-ViT",),
    vision=_vision,
    tower_tensors=tower_tensors,
)
INSTRUCTBLIP = BLIP2._replace(
    name="InstructBlipForConditionalGeneration",
    model_type="instructblip",
    vision=lambda tower: _vision(tower) | {"model_type": "instructblip_vision_model"},
    derived=_with_words,
    about="The question goes in twice: in the prompt, and alone to the Q-Former, by the same tokenizer, at most "
    "`qformer_config.max_position_embeddings` tokens of it. Questions of a batch are padded behind: "
    '`padding=True, padding_side="right"`.',
    prepare='asked = processor.tokenizer(question, add_special_tokens=False, return_tensors="pt")\n'
    'inputs |= {"qformer_input_ids": asked["input_ids"], "qformer_attention_mask": asked["attention_mask"]}',
)
