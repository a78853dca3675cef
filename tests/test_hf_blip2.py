"""What only BLIP-2's and InstructBLIP's directories have: one matrix for q, k and v, words of their own, the question beside."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
import transformers

from tcjax.export import hf, hf_folder
from tcjax.export.torch.remote import verify
from tcjax.interop import tensors
from tcjax.vlm import VlmConfig
from tests.hosted import IDENTITY, ROOT, TOWERS, a_model, a_run
from tests.planted import noise
from tests.test_hf import QFORMER, STOCK, TOLD, change_weights, spoiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of InstructBLIP, not verified: tests/test_hf.py does that."""
    out = tmp_path_factory.mktemp("hf") / "instructblip"
    run = STOCK["instructblip"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_folder, "certify", lambda folder: {"ran": False, "note": "not run"})
        return hf.export(run, a_model(run), IDENTITY, out=out, root=ROOT)


def reorder(weights):
    """Rows (k, v, q) instead of (q, k, v)."""
    name = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    weights[name] = weights[name][[*range(16, 48), *range(16)]]


def forget_the_bias(weights):
    name = "qformer.embeddings.word_embeddings.weight"
    weights[name] = weights[name] - a_model(STOCK["instructblip"][0]).compressor.text_proj.bias[...]


def class_token_last(weights):
    name = "vision_model.embeddings.position_embedding"
    weights[name] = weights[name][:, [*range(1, 17), 0]]


@pytest.mark.parametrize("spoil", [reorder, forget_the_bias, class_token_last])
def test_a_spoiled_directory_is_caught(spoil, folder, tmp_path):
    copy = spoiled(folder, tmp_path)
    assert verify.check(copy, hashes=False)["problems"] == []
    change_weights(spoil)(copy)
    assert re.match("logits: off by", verify.check(copy, hashes=False)["problems"][0])


def test_nothing_of_ours_is_left(folder):
    found = tensors.load(folder / "model.safetensors")
    assert found["qformer.embeddings.word_embeddings.weight"].shape == (64, 24)
    assert not any(name.startswith("text_proj") for name in found)


@torch.inference_mode()
def test_every_question_of_a_padded_batch_answers_as_it_would_alone(folder):
    """As the README pads them: prompts in front, questions behind."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    questions, pixels = ["colour of 7 ?", "count ?"], torch.from_numpy(noise(2, 3, 16, 16))

    def inputs(rows: slice) -> dict:
        prompts = ["<bos>" + 3 * "<image>" + f"<user>{question}<assistant>" for question in questions[rows]]
        found = processor.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        asked = processor.tokenizer(
            questions[rows], add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        told = {"qformer_input_ids": asked["input_ids"], "qformer_attention_mask": asked["attention_mask"]}
        ids = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
        return {"pixel_values": pixels[rows], **ids, **told}

    both = model(**inputs(slice(0, 2))).logits[:, -1]
    assert (inputs(slice(0, 2))["qformer_attention_mask"].sum(1)).tolist() == [4, 2]
    for i in range(2):
        alone = model(**inputs(slice(i, i + 1))).logits[:, -1]
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=1e-5)
    swapped = inputs(slice(0, 1)) | {"qformer_input_ids": inputs(slice(1, 2))["qformer_input_ids"]}
    swapped["qformer_attention_mask"] = torch.ones_like(swapped["qformer_input_ids"])
    assert (model(**swapped).logits[:, -1] - both[:1]).abs().max() > 1e-3  # the question does something


REFUSED = {
    "no class token": (
        a_run(dataclasses.replace(QFORMER, class_token=False), "eva"),
        r"Blip2\w+: it reads the tower's class token too; train with qformer.Config\(class_token=True\)",
    ),
    "another tower": (a_run(TOLD, "clip"), r"InstructBlip\w+: the tower is CLIP, and the host has EVA-ViT"),
    "no class token to keep": (
        a_run(dataclasses.replace(QFORMER, class_token=False)),
        r"the tower is SigLIP, and the host has EVA-ViT",
    ),
    "before the norm": (a_run(QFORMER, "internvit"), r"reads its tower behind the last norm \(feature_layer=-1\)"),
    "fewer queries": (a_run(QFORMER.at(2), "eva"), r"it uses all of its 3 queries, this run 2 of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused_with_the_reason(case):
    run, message = REFUSED[case]
    assert re.search(message, hf.why_not(run))


def test_a_tower_without_a_class_token_cannot_keep_it():
    model = VlmConfig(tower=TOWERS["siglip"], compressor=QFORMER, llm=STOCK["blip2"][0].model.llm)
    with pytest.raises(ValueError, match=r"no class token .*or a compressor that does without \(qformer.Config"):
        model.num_queries  # noqa: B018


@pytest.mark.slow
@pytest.mark.fresh
def test_a_fresh_process_follows_the_readme(folder):
    readme = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    program = f"""
import sys
for package in ("jax", "jaxlib", "flax", "tcjax"):
    sys.modules[package] = None
import numpy
question, image = "count red ?", numpy.zeros((16, 16, 3), numpy.uint8)
{readme[1]}
print(answer.shape[1])
"""
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
