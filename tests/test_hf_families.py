"""Every compressor of the catalogue in a Hugging Face directory with code, or the reason why not."""

import dataclasses
import re

import pytest
import torch
import transformers

from configs import boards_base
from configs.compressors import BOARDS
from tcjax.assemble import assemble
from tcjax.compressors import query_resampler
from tcjax.export import hf_chat, hf_folder, hf_remote
from tcjax.export.torch.remote import verify
from tcjax.vlm import VlmConfig
from tests.hosted import IDENTITY, ROOT, a_model, a_run
from tests.planted import noise, plant


@pytest.mark.slow
@pytest.mark.parametrize("name", BOARDS)
def test_remote_code_holds_every_family_or_says_why_not(name, tmp_path, monkeypatch):
    """On the tower and the LLM of the boards; 16 tokens where the family can give them."""
    monkeypatch.setattr(hf_folder, "certify", lambda folder: hf_folder.judged(verify.check(folder, hashes=False)))
    model = VlmConfig(tower=boards_base.tower_config(), compressor=None, llm=boards_base.llm_config())
    for num_queries in (16, 64, 256):
        run = a_run(None).replace(model=dataclasses.replace(model, compressor=BOARDS[name](num_queries)))
        try:
            run.model.num_queries  # noqa: B018
        except ValueError:
            continue
        break
    if reason := hf_remote.why_not(run):
        assert re.search("needs prior|decides per image|image is resized", reason), reason
        return
    vlm, identity = assemble(run.model, root=ROOT)
    plant(vlm.compressor)
    folder = hf_remote.export(run, vlm, identity, out=tmp_path / name, root=ROOT)
    assert verify.check(folder)["relative"] < 1e-5


def test_every_prompt_of_a_batch_tells_its_own_question(tmp_path, monkeypatch):
    """Questions of different lengths, two turns, padding on the left: each row answers as it would alone."""
    monkeypatch.setattr(hf_folder, "certify", lambda folder: hf_folder.judged(verify.check(folder, hashes=False)))
    told = query_resampler.Config(num_queries=4, width=16, heads=2, kv_heads=1, head_width=8)
    run = a_run(told)
    folder = hf_remote.export(run, a_model(run), IDENTITY, out=tmp_path / "told", root=ROOT)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    chat = hf_chat.chat_of(run, ROOT)
    single = chat.render_question("colour of 7 ?", num_queries=4)
    double = [*single, *chat.answer_ids("red"), *chat.render_question("read word ?", num_queries=0)[1:]]
    longest = max(len(single), len(double))
    ids = torch.tensor([[chat.pad_id] * (longest - len(row)) + row for row in (single, double)])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in (single, double)])
    pixels = torch.from_numpy(noise(2, 3, 16, 16))
    said = model.model.question(ids)
    assert said["text_valid"].sum(1).tolist() == [4, 7]
    with torch.inference_mode():
        both = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, -1]
        for i, row in enumerate((single, double)):
            alone = model(input_ids=torch.tensor([row]), pixel_values=pixels[i : i + 1]).logits[:, -1]
            torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=1e-5)
        other = single.copy()
        other[other.index(chat.encode("7")[0])] = chat.encode("3")[0]
        asked = model.model.get_image_features(pixels[:1], question_ids=torch.tensor([single])).pooler_output[0]
        changed = model.model.get_image_features(pixels[:1], question_ids=torch.tensor([other])).pooler_output[0]
        assert (asked - changed).abs().max() > 1e-3
        with pytest.raises(ValueError, match="one image per prompt"):
            model(input_ids=ids, pixel_values=pixels[:1])
