"""LAVIS's BLIP-2 and InstructBLIP checkpoints under transformers' names, and what they compute.

golden/qformer_lavis.safetensors was made by salesforce/LAVIS at 506965b, lavis/models/blip2_models/Qformer.py, class
BertLMHeadModel of width 8 with random weights: "model.*" is the checkpoint as its training saves it (with the heads of
stage 1 and InstructBLIP's llm_proj), the rest are inputs and llm_proj of `Qformer.bert` with and without text.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from tcjax.compressors import qformer
from tcjax.compressors.base import Context, Widths
from tcjax.interop import names, tensors
from tcjax.interop.lavis import is_lavis, to_hugging_face

GOLDEN = tensors.load(Path(__file__).parent / "golden" / "qformer_lavis.safetensors")
CHECKPOINT = {name.removeprefix("model."): array for name, array in GOLDEN.items() if name.startswith("model.")}
WIDTHS = Widths(grid_HW=(1, 7), vision_C=6, llm_D=10, text_D=8)
SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12}
SIZES |= {"max_position_embeddings": 9, "encoder_hidden_size": 6}


def imported(text: bool) -> nnx.Module:
    config = qformer.Config(num_queries=5, depth=4, width=8, heads=2, feed_forward=12, text=text, max_text=9)
    module = config.build(WIDTHS, nnx.Rngs(0))
    renamed = to_hugging_face(CHECKPOINT, text=text).compressor
    names.assign(module, names.from_torch(renamed, config.names(WIDTHS), names.shapes(module)))
    return module


def test_a_blip2_checkpoint_computes_what_lavis_computed():
    found = imported(text=False)(GOLDEN["tokens"], Context(GOLDEN["valid"]))
    np.testing.assert_allclose(found.tokens_BQD, GOLDEN["without_text"], atol=1e-5)


def test_an_instruct_blip_checkpoint_computes_what_lavis_computed():
    words_VE = to_hugging_face(CHECKPOINT, text=True).neighbours["qformer.embeddings.word_embeddings.weight"]
    told = Context(GOLDEN["valid"], text_BTD=words_VE[GOLDEN["ids"]], text_valid_BT=GOLDEN["text_valid"])
    found = imported(text=True)(GOLDEN["tokens"], told)
    np.testing.assert_allclose(found.tokens_BQD, GOLDEN["with_text"], atol=1e-5)
    null = told._replace(text_valid_BT=np.zeros_like(GOLDEN["text_valid"]))
    np.testing.assert_allclose(
        imported(text=True)(GOLDEN["tokens"], null).tokens_BQD, GOLDEN["without_text"], atol=1e-5
    )


def from_hugging_face(name: str) -> str:
    """The way back, by transformers' own conversion scripts read from right to left."""
    name = re.sub(r"^qformer\.(embeddings\.)?layernorm", "Qformer.bert.embeddings.LayerNorm", name)
    name = name.replace("attention.attention.", "attention.self.")
    name = name.replace("vision_model.post_layernorm", "ln_vision").replace("language_projection", "opt_proj")
    return re.sub(r"^qformer\.", "Qformer.bert.", name)


@pytest.mark.parametrize("text", [False, True])
def test_names_come_back(text):
    """transformers' own weights, renamed to LAVIS's and back, are all there under the same names."""
    theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig(**SIZES)) if text else None
    theirs = theirs or Blip2QFormerModel(Blip2QFormerConfig(**SIZES))
    published = {f"qformer.{key}": value.numpy(force=True) for key, value in theirs.state_dict().items()}
    published |= {name: np.ones(3) for name in ("query_tokens", "language_projection.weight")}
    published |= {
        name: np.ones(6) for name in ("vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias")
    }
    checkpoint = {from_hugging_face(name): array for name, array in published.items()}
    assert is_lavis(checkpoint)
    assert not is_lavis(published)
    renamed = to_hugging_face(checkpoint, text=text)
    assert renamed.dropped == []
    assert renamed.compressor | renamed.neighbours == published
    outside = {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}
    assert renamed.neighbours.keys() == outside | ({"qformer.embeddings.word_embeddings.weight"} if text else set())


def test_what_no_compressor_reads_is_dropped_and_listed():
    with_text, without = (to_hugging_face(CHECKPOINT, text=text).dropped for text in (True, False))
    heads = {key.partition(".")[0] for key in with_text if not key.startswith("Qformer.")}
    assert heads == {"visual_encoder", "vision_proj", "text_proj", "itm_head", "temp"}
    rest = {key for key in with_text if key.startswith("Qformer.") and not key.startswith("Qformer.cls.")}
    assert rest == {"Qformer.bert.embeddings.position_ids"}
    assert len(with_text) + 2 + 4 * 6 == len(without)  # words, positions, and four layers' feed-forward for text
    assert {key for key in CHECKPOINT if key.startswith("ln_vision")} & {*with_text, *without} == set()


def test_a_name_nobody_knows_is_for_the_table_to_refuse():
    renamed = to_hugging_face(CHECKPOINT | {"Qformer.bert.adapter.weight": np.ones(3)}, text=False)
    assert "qformer.adapter.weight" in renamed.compressor
    with pytest.raises(ValueError, match=r"opt_proj.weight would be a second language_projection.weight"):
        to_hugging_face(CHECKPOINT | {"opt_proj.weight": np.ones(3)}, text=False)
