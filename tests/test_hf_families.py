"""Every compressor of the catalogue in a Hugging Face directory with code, or the reason why not."""

import dataclasses
import re

import pytest

from configs import boards_base
from configs.compressors import BOARDS
from tcjax.assemble import assemble
from tcjax.export import hf_folder, hf_remote
from tcjax.export.torch.remote import verify
from tcjax.vlm import VlmConfig
from tests.hosted import ROOT, a_run
from tests.planted import plant


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
        assert re.search("needs (text|prior)|decides per image|image is resized", reason), reason
        return
    vlm, identity = assemble(run.model, root=ROOT)
    plant(vlm.compressor)
    folder = hf_remote.export(run, vlm, identity, out=tmp_path / name, root=ROOT)
    assert verify.check(folder)["relative"] < 1e-5
