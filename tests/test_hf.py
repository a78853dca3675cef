"""Hugging Face directories: transformers computes our model from them, and a spoiled one is caught by name."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tcjax.compressors import avg_pool, mlp, pixel_shuffle, resampler
from tcjax.config import Pixels
from tcjax.export import hf, hf_folder, hf_remote
from tcjax.export.torch.remote import verify
from tcjax.interop import tensors
from tests.hosted import IDENTITY, ROOT, TOWERS, a_model, a_run

RESAMPLER = resampler.Config(num_queries=3, depth=1, heads=2, head_width=8)
STOCK = {  # name: (run, class)
    "llava-clip": (a_run(mlp.Config(), "clip", "llama3"), "LlavaForConditionalGeneration"),
    "llava-siglip": (a_run(mlp.Config(), "siglip-2", "qwen2"), "LlavaForConditionalGeneration"),
    "idefics3": (a_run(pixel_shuffle.Config(num_queries=4), "siglip", "qwen3"), "Idefics3ForConditionalGeneration"),
    "internvl": (
        a_run(pixel_shuffle.Config(num_queries=4, head="mlp"), "internvit", "llama3"),
        "InternVLForConditionalGeneration",
    ),
}
REMOTE = {
    "mlp": a_run(mlp.Config(), "siglip", "llama"),
    "avg_pool-clip": a_run(avg_pool.Config(num_queries=4), "clip", "llama3"),
    "pixel_shuffle": a_run(pixel_shuffle.Config(num_queries=4, head="mlp"), "siglip-2", "qwen2"),
    "resampler": a_run(RESAMPLER, "siglip", "qwen3"),
}


@pytest.fixture(autouse=True)
def same_process(monkeypatch, request):
    """verify.py in this process: importing transformers once instead of once per test."""
    if "fresh" not in request.keywords:
        monkeypatch.setattr(hf_folder, "certify", lambda folder: hf_folder.judged(verify.check(folder, hashes=False)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders to read, written once: name -> path."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            kind, _, case = name.partition("/")
            run = STOCK[case][0] if kind == "hf" else REMOTE[case]
            out = tmp_path_factory.mktemp("hf") / case
            target = hf if kind == "hf" else hf_remote
            assert target.why_not(run) == ""
            written[name] = target.export(run, a_model(run), IDENTITY, out=out, root=ROOT)
        return written[name]

    return folder


@pytest.mark.parametrize("case", STOCK)
def test_a_stock_class_computes_what_was_trained(case, folders):
    report = verify.check(folders(f"hf/{case}"))
    assert report["problems"] == []
    assert report["class"] == STOCK[case][1]
    assert report["relative"] < 5e-6
    assert json.loads((folders(f"hf/{case}") / "manifest.json").read_text())["parity"]["relative"] < 5e-6


@pytest.mark.parametrize("case", REMOTE)
def test_remote_code_computes_what_was_trained(case, folders):
    report = verify.check(folders(f"hf-remote/{case}"))
    assert report["problems"] == []
    assert report["class"] == hf_remote.NAME
    assert report["relative"] < 5e-6
