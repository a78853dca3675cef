"""A trained LLM leaves as a published checkpoint: transformers computes what was trained, and so do we, with LoRA merged."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tcjax.assemble import assemble, build
from tcjax.cli import main
from tcjax.compressors import mlp
from tcjax.config import LoraConfig, Run, TrainConfig
from tcjax.export import hf_folder, llm
from tcjax.export.run import export_run
from tcjax.export.torch.remote import verify
from tcjax.interop import tensors
from tcjax.job import train_run, trained
from tcjax.llms import published
from tcjax.vlm import Vlm, VlmConfig
from tests.decoder_twins import randomise
from tests.hosted import IDENTITY, LLMS, ROOT, TOWERS, a_run
from tests.planted import plant
from tests.tiny_boards import PIXELS, data_config, make_project

LORA = LoraConfig(
    rank=3, alpha=1.5
)  # planted updates are large: at 6.0 one rounded bit of a kernel moves logits by 5e-6
MERGED = TrainConfig(steps=6, trainable=("compressor", "lora"), lora=LORA)
WHOLE = TrainConfig(steps=6, trainable=("compressor", "llm"))
MISTRAL = dataclasses.replace(LLMS["llama"], tie=False, window=3)


@pytest.fixture(autouse=True)
def same_process(monkeypatch, request):
    """verify.py in this process: importing transformers once instead of once per test."""
    if "fresh" not in request.keywords:
        monkeypatch.setattr(hf_folder, "certify", lambda folder: hf_folder.judged(verify.check(folder, hashes=False)))


def a_trained(llm_name: str, train: TrainConfig) -> tuple[Run, Vlm]:
    run = a_run(mlp.Config(), "clip", llm_name).replace(train=train)
    return run, plant(build(run.model, lora=train.lora))  # pyright: ignore[reportReturnType]


def our_logits(module) -> np.ndarray:
    tokens_BS = np.arange(24).reshape(2, 12) % 64
    return np.asarray(jax.jit(lambda: module.logits(module(module.embed(tokens_BS))))())


def their_logits(folder) -> np.ndarray:
    """Loaded without a missing, unexpected or misshapen tensor."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(2, 12) % 64).logits.numpy()


@pytest.mark.parametrize("train", [MERGED, WHOLE], ids=["lora", "whole"])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "mistral"])
def test_transformers_computes_the_exported_llm(name, train, tmp_path, monkeypatch):
    monkeypatch.setitem(LLMS, "mistral", MISTRAL)
    run, model = a_trained(name, train)
    folder = export_run("llm", run, model, IDENTITY, out=tmp_path / "out", root=ROOT)
    expected = our_logits(model.llm)
    np.testing.assert_allclose(their_logits(folder), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    cfg = published.llm("out", root=tmp_path)
    assert dataclasses.replace(cfg, weights="") == run.model.llm
    config = VlmConfig(tower=run.model.tower, compressor=run.model.compressor, llm=cfg)
    again, identity = assemble(config, root=tmp_path)
    np.testing.assert_allclose(our_logits(again.llm), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert identity["llm.weights"] == tensors.content_hash(folder)


def test_a_fresh_update_leaves_the_published_bytes_as_they_were(tmp_path):
    run, _ = a_trained("qwen2", MERGED)
    plain, _ = assemble(run.model, root=tmp_path)
    model, _ = assemble(run.model, root=tmp_path, lora=LORA)
    merged = export_run("llm", run, model, IDENTITY, out=tmp_path / "merged", root=ROOT)
    whole = export_run("llm", run.replace(train=WHOLE), plain, IDENTITY, out=tmp_path / "whole", root=ROOT)
    (shard,) = (path.name for path in merged.glob("model-*.safetensors"))
    assert (merged / shard).read_bytes() == (whole / shard).read_bytes()


def test_shards_are_named_by_their_index_and_hold_everything_once(tmp_path):
    run, model = a_trained("llama3", MERGED)
    limit = 8_000
    folder = llm.export(run, model, IDENTITY, out=tmp_path / "out", root=ROOT, shard=limit)
    index = json.loads((folder / tensors.INDEX).read_text())
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"].values()) == set(shards)
    found = tensors.load(folder)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    for shard in shards:
        sizes = [array.nbytes for array in tensors.load(folder / shard).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert found.keys() == index["weight_map"].keys()
    np.testing.assert_allclose(their_logits(folder), our_logits(model.llm), atol=1e-4)


def test_a_bfloat16_llm_stays_bfloat16(tmp_path):
    run, model = a_trained("qwen3", MERGED)
    state = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), nnx.state(model.llm))
    nnx.update(model.llm, state)
    folder = export_run("llm", run, model, IDENTITY, out=tmp_path / "out", root=ROOT)
    assert {array.dtype.name for array in tensors.load(folder).values()} == {"bfloat16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert 1e-4 < json.loads((folder / "manifest.json").read_text())["parity"]["relative"] < 5e-2


def test_a_frozen_llm_is_not_exported(tmp_path):
    run, model = a_trained("llama", TrainConfig(steps=6))
    with pytest.raises(
        ValueError, match=r"its LLM is frozen and still the one in no file\. These can: artifact, parts"
    ):
        export_run("llm", run, model, IDENTITY, out=tmp_path / "out", root=ROOT)
    assert not (tmp_path / "out").exists()


def test_parts_hold_the_merged_llm_under_its_published_names(tmp_path):
    run, model = a_trained("llama3", MERGED)
    folder = export_run("llm", run, model, IDENTITY, out=tmp_path / "llm", root=ROOT)
    parts = export_run("parts", run, model, IDENTITY, out=tmp_path / "parts", root=ROOT)
    assert sorted(path.name for path in parts.glob("*.safetensors")) == ["llm.safetensors", "projector.safetensors"]
    assert tensors.content_hash(parts / "llm.safetensors") == tensors.content_hash(folder)


@pytest.mark.parametrize("target", ["hf", "hf-remote"])
def test_a_whole_model_is_written_with_its_updates_merged(target, tmp_path):
    """verify.py compares logits and the greedy answer with the model that still has its updates beside it."""
    run, model = a_trained("qwen2", MERGED)
    folder = export_run(target, run, model, IDENTITY, out=tmp_path / "out", root=ROOT)
    assert json.loads((folder / "manifest.json").read_text())["parity"]["relative"] < 1e-5
    found = tensors.load(folder / "model.safetensors")
    assert not [name for name in found if "lora" in name]


def saved_qwen2(folder) -> None:
    """A tiny Qwen2 of the boards' 64 words as a downloaded checkpoint."""
    fields = published.to_json(LLMS["qwen2"]) | {"max_position_embeddings": 512, "bos_token_id": 7}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields))
    randomise(model)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")


def test_a_merge_that_went_wrong_is_not_published(tmp_path, monkeypatch):
    """Transposed updates have the shape of a square kernel; only the logits tell."""
    run, model = a_trained("qwen2", MERGED)
    spoil = llm.published_tensors

    def spoiled(decoder):
        for arrays in spoil(decoder):
            yield {key: np.ascontiguousarray(a.T) if "q_proj.weight" in key else a for key, a in arrays.items()}

    monkeypatch.setattr(llm, "published_tensors", spoiled)
    with pytest.raises(ValueError, match="nothing was exported:\nlogits: off by"):
        export_run("llm", run, model, IDENTITY, out=tmp_path / "out", root=ROOT)
    assert not (tmp_path / "out").exists()


@pytest.mark.fresh
def test_from_a_downloaded_checkpoint_through_training_to_a_published_one(tmp_path, capsys):
    """The whole way by the command line: llm(folder), two steps of LoRA, export --to llm, transformers."""
    root = make_project(tmp_path)
    (root / "configs").mkdir()
    saved_qwen2(root / "checkpoints/tiny-qwen2")
    cfg = published.llm("checkpoints/tiny-qwen2", root=root)
    tower = dataclasses.replace(TOWERS["siglip"], pixels=PIXELS, patch=16)
    run = Run(
        name="lora",
        model=VlmConfig(tower=tower, compressor=mlp.Config(), llm=cfg),
        data=data_config(batch=8),
        train=dataclasses.replace(
            MERGED, steps=2, warmup=0.0, peak_lr=2e-2, lr_of={"compressor": 2e-3}, log_every=1, save_every=0
        ),
    )
    train_run(run, root=root, out=root / "run", quiet=True)
    model, _, step = trained(run, root=root, out=root / "run")
    assert step == 2
    capsys.readouterr()
    assert main(["export", str(root / "run"), "--to", "llm", "--out", str(root / "merged")]) == 0
    assert capsys.readouterr().out.strip() == str(root / "merged")
    expected = our_logits(model.llm)
    np.testing.assert_allclose(their_logits(root / "merged"), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(their_logits(root / "checkpoints/tiny-qwen2") - expected).max() > 1e-2
    said = json.loads((root / "merged/config.json").read_text())
    assert (said["max_position_embeddings"], said["bos_token_id"]) == (512, 7)
    assert (root / "merged/tokenizer_config.json").read_text() == "{}"
