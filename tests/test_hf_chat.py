"""Exported chats: what transformers' processor makes of a conversation are the ids of training, or the export is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import transformers
from PIL import Image

from configs import templates
from tcjax.compressors import mlp, pixel_shuffle, query_resampler
from tcjax.config import Run, Template
from tcjax.export import hf, hf_chat, hf_folder, hf_remote
from tcjax.export.torch.remote import verify
from tcjax.pipeline.sample import Turn
from tests.chats import FOLDER, MODEL
from tests.hosted import IDENTITY, ROOT, a_model, a_run

Q = 4
VICUNA = dataclasses.replace(templates.VICUNA_V1, image="<unk>", pad="</s>")
CASES = {  # name: (template, legacy or None for the byte-level tokenizer)
    "vicuna_v1": (VICUNA, True),
    "llama_2": (dataclasses.replace(templates.LLAMA_2, image="<unk>", pad="</s>"), True),
    "llava_hf": (templates.LLAVA_HF, True),
    "llava_hf-new": (templates.LLAVA_HF, False),
    "qwen": (templates.QWEN, None),
    "chatml": (dataclasses.replace(templates.CHATML, image="<|image_pad|>", pad="<|endoftext|>"), None),
    "llama_3": (dataclasses.replace(templates.LLAMA_3, pad="<|endoftext|>"), None),
    "plain": (dataclasses.replace(templates.PLAIN, image="<unk>", pad="</s>"), True),
}


def run_of(
    folder: Path, template: Template, legacy: bool | None, compressor=pixel_shuffle.Config(num_queries=Q)
) -> Run:
    """A run whose tokenizer is a checkpoint's folder: only a tokenizer.model, or the byte-level tokenizer.json."""
    folder.mkdir()
    if legacy is None:
        shutil.copy(FOLDER / "bytes.json", folder / "tokenizer.json")
    else:
        shutil.copy(MODEL, folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "bos_token": "<s>"}))
        (folder / "added_tokens.json").write_text(json.dumps({"<image>": 800, "<pad>": 801}))
    run = a_run(compressor, "siglip", "llama")
    model = dataclasses.replace(run.model, llm=dataclasses.replace(run.model.llm, vocab=811))
    return run.replace(model=model, data=dataclasses.replace(run.data, tokenizer=str(folder), template=template))


@pytest.mark.parametrize("case", CASES)
def test_a_processor_writes_the_ids_of_training(case, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_folder, "certify", lambda folder: hf_folder.judged(verify.check(folder, hashes=False)))
    run = run_of(tmp_path / "llm", *CASES[case])
    assert hf.why_not(run) == ""
    out = hf.export(run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    assert verify.check(out)["problems"] == []
    processor = transformers.AutoProcessor.from_pretrained(out)
    chat, image = hf_chat.chat_of(run, ROOT), Image.new("RGB", (16, 16))
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is red?"}]}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "A bus.\nTwo"}]}
    again = {"role": "user", "content": [{"type": "text", "text": "How many people?"}]}

    def ids(messages: list, prompt: bool) -> list[int]:
        text = processor.apply_chat_template(messages, add_generation_prompt=prompt)
        return processor(images=image, text=text)["input_ids"][0]

    assert ids(asked, True) == chat.ask("What is red?", num_queries=Q).ids
    turns = [Turn("What is red?", "A bus.\nTwo"), Turn("How many people?", "A bus.\nTwo")]
    if run.data.template.question:
        whole = chat.compose(turns, num_queries=Q, text_length=1000)
        assert ids([*asked, said, again, said], False) == whole.ids
        plain = [{"role": "user", "content": "How many people?"}]
        assert ids_of_text(processor, plain) == chat.ask("How many people?", num_queries=Q, num_images=0).ids
        with pytest.raises(Exception, match="trained with one system text"):
            processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *asked])
    assert processor.tokenizer.eos_token_id in chat.stop_ids
    assert processor.tokenizer.pad_token_id == chat.pad_id


def ids_of_text(processor, messages: list) -> list[int]:
    return processor(text=processor.apply_chat_template(messages, add_generation_prompt=True))["input_ids"][0]


@pytest.mark.parametrize(
    "template, legacy, message",
    [
        (VICUNA, False, r"not with Template.passes='between'"),  # after an image transformers puts no blank
        (dataclasses.replace(templates.PRISMATIC_VICUNA, image="<unk>", pad="</s>"), True, "Template.passes='message'"),
        (dataclasses.replace(VICUNA, begin=""), True, "begin mark ''"),
        (dataclasses.replace(VICUNA, pad="<unk>"), True, r"both id 0: padding would be taken for images.*pad='</s>'"),
    ],
)
def test_a_chat_that_transformers_would_tokenise_otherwise_is_refused(template, legacy, message, tmp_path):
    run = run_of(tmp_path / "llm", template, legacy)
    with pytest.raises(ValueError, match=message):
        hf.export(run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    assert not (tmp_path / "out").exists()


def test_templates_that_no_processor_writes_are_named_before_anything_is_read(tmp_path):
    run = run_of(tmp_path / "a", templates.VICUNA_V1, True)
    for target in (hf, hf_remote):
        assert "Template.image is empty" in target.why_not(run)
    honeybee = run_of(tmp_path / "b", dataclasses.replace(templates.HONEYBEE, image="<unk>", pad="</s>"), True)
    assert "no chat_template is written for Template.place='message'" in hf.why_not(honeybee)
    told = query_resampler.Config(num_queries=4, width=16, heads=2, kv_heads=1, head_width=8)
    assert "tokenised alone" in hf_remote.why_not(run_of(tmp_path / "c", VICUNA, True, told))
    assert hf_remote.why_not(run_of(tmp_path / "d", VICUNA, True, mlp.Config())) == ""
