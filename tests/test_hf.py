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

from tcjax.compressors import avg_pool, idefics2_resampler, mlp, pixel_shuffle, qformer, resampler
from tcjax.config import Pixels
from tcjax.export import hf, hf_folder, hf_remote
from tcjax.export.torch.remote import verify
from tcjax.interop import tensors
from tests.hosted import IDENTITY, ROOT, TOWERS, a_model, a_run

RESAMPLER = resampler.Config(num_queries=3, depth=1, heads=2, head_width=8)
IDEFICS2 = idefics2_resampler.Config(num_queries=3, depth=2, heads=4, kv_heads=2, head_width=6, projection=32)
QFORMER = qformer.Config(num_queries=3, depth=4, width=24, heads=3, feed_forward=20, class_token=True)
EVERY_LAYER = dataclasses.replace(QFORMER, depth=2, cross_every=1)
TOLD = dataclasses.replace(QFORMER, text=True, max_text=7)
OWN_WORDS = dataclasses.replace(TOLD, width=16, heads=2)  # as wide as the LLM: no text_proj
STOCK = {  # name: (run, class)
    "llava-clip": (a_run(mlp.Config(), "clip", "llama3"), "LlavaForConditionalGeneration"),
    "llava-siglip": (a_run(mlp.Config(), "siglip-2", "qwen2"), "LlavaForConditionalGeneration"),
    "idefics3": (a_run(pixel_shuffle.Config(num_queries=4), "siglip", "qwen3"), "Idefics3ForConditionalGeneration"),
    "idefics2": (a_run(IDEFICS2, "siglip", "llama3"), "Idefics2ForConditionalGeneration"),
    "internvl": (
        a_run(pixel_shuffle.Config(num_queries=4, head="mlp"), "internvit", "llama3"),
        "InternVLForConditionalGeneration",
    ),
    "blip2": (a_run(QFORMER, "eva", "llama3"), "Blip2ForConditionalGeneration"),
    "blip2-tied": (a_run(EVERY_LAYER, "eva", "qwen2"), "Blip2ForConditionalGeneration"),
    "instructblip": (a_run(TOLD, "eva", "qwen3"), "InstructBlipForConditionalGeneration"),
    "instructblip-own-words": (a_run(OWN_WORDS, "eva", "llama"), "InstructBlipForConditionalGeneration"),
}
REMOTE = {
    "mlp": a_run(mlp.Config(), "siglip", "llama"),
    "avg_pool-clip": a_run(avg_pool.Config(num_queries=4), "clip", "llama3"),
    "pixel_shuffle": a_run(pixel_shuffle.Config(num_queries=4, head="mlp"), "siglip-2", "qwen2"),
    "resampler": a_run(RESAMPLER, "siglip", "qwen3"),
    "qformer-class": a_run(TOLD, "clip", "llama"),
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


def spoiled(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / tmp_path.name))  # a name of its own: transformers caches code by it


def change_weights(change):
    def spoil(folder: Path) -> None:
        weights = tensors.load(folder / "model.safetensors")
        change(weights)
        tensors.save(folder / "model.safetensors", weights)

    return spoil


def change_config(**changes):
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, value in changes.items():
            inner, _, field = name.rpartition("__")
            (config[inner] if inner else config)[field] = value
        path.write_text(json.dumps(config))

    return spoil


def replace_code(name: str, right: str, wrong: str):
    def spoil(folder: Path) -> None:
        text = (folder / name).read_text()
        assert text.count(right) == 1
        (folder / name).write_text(text.replace(right, wrong))

    return spoil


def transpose(weights):
    weights["multi_modal_projector.linear_2.weight"] = weights["multi_modal_projector.linear_2.weight"].T


def swap_keys_and_values(weights):
    name = "model.multi_modal_projector.layers.0.0.to_kv.weight"
    weights[name] = np.roll(weights[name], len(weights[name]) // 2, axis=0)


def merge_channel_first(weights):
    """Columns (channel, row, column) instead of (row, column, channel): PixelUnshuffle's order, with equal shapes."""
    name = "model.connector.modality_projection.proj.weight"
    D, E = weights[name].shape
    weights[name] = weights[name].reshape(D, 4, E // 4).transpose(0, 2, 1).reshape(D, E)


def tie_the_head(folder: Path) -> None:
    """What saving a model whose outer config ties it does to an untied LLM: the head is not in the file."""
    change_config(tie_word_embeddings=True)(folder)
    change_weights(lambda weights: weights.pop("language_model.lm_head.weight"))(folder)


def another_prefix(weights):
    for name in [name for name in weights if name.startswith("model.multi_modal_projector")]:
        weights[name.replace("multi_modal_projector", "compressor")] = weights.pop(name)


LINEAR = "multi_modal_projector.linear_1.bias"
PROJECTOR_CODE = "        self.multi_modal_projector = Compressor(config.compressor)\n"
SPOILED = {  # name: (folder, what is done to it, what the check says)
    "a transposed square matrix": ("hf/llava-clip", change_weights(transpose), r"logits: off by"),
    "a dropped tensor": ("hf/llava-clip", change_weights(lambda w: w.pop(LINEAR)), r"missing keys: .*linear_1.bias"),
    "an extra tensor": (
        "hf/llava-clip",
        change_weights(lambda w: w.update({"multi_modal_projector.linear_3.bias": w[LINEAR]})),
        r"unexpected keys: .*linear_3.bias",
    ),
    "a misshapen tensor": (
        "hf/llava-clip",
        change_weights(lambda w: w.update({LINEAR: w[LINEAR][:-1]})),
        r"mismatched keys: .*linear_1.bias",
    ),
    "another gelu": ("hf/llava-clip", change_config(projector_hidden_act="quick_gelu"), r"logits: off by"),
    "another layer of the tower": ("hf/llava-clip", change_config(vision_feature_layer=-3), r"logits: off by"),
    "the class token kept": (
        "hf/llava-clip",
        change_config(vision_feature_select_strategy="full"),
        r"Image features and image tokens do not match",
    ),
    "another eps of the tower": ("hf/llava-clip", change_config(vision_config__layer_norm_eps=1e-2), r"logits: off by"),
    "another eps of the latents": (
        "hf/idefics2",
        change_config(perceiver_config__rms_norm_eps=1e-2),
        r"logits: off by",
    ),
    "another theta": ("hf/llava-clip", change_config(text_config__rope_theta=5e5), r"logits: off by"),
    "a tied head": ("hf/internvl", tie_the_head, r"logits: off by"),
    "keys and values swapped": ("hf-remote/resampler", change_weights(swap_keys_and_values), r"logits: off by"),
    "another merge order": ("hf/idefics3", change_weights(merge_channel_first), r"logits: off by"),
    "another prefix": (
        "hf-remote/mlp",
        change_weights(another_prefix),
        r"(?s)missing keys: model.multi_modal_projector.0.bias.*unexpected keys: model.compressor.0.bias",
    ),
    "a table kept in a buffer": (
        "hf-remote/mlp",
        replace_code(
            "modeling_tcjax_llava.py",
            PROJECTOR_CODE,
            PROJECTOR_CODE
            + "        self.register_buffer('table', torch.full((64,), 1.0), persistent=False)\n"
            + "        self.multi_modal_projector.register_forward_hook(lambda m, i, o: o * self.table.mean())\n",
        ),
        r"table is not finite|logits: (off by|not finite)",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_directory_is_caught_by_name(name, folders, tmp_path):
    source, spoil, message = SPOILED[name]
    folder = spoiled(folders(source), tmp_path)
    spoil(folder)
    try:
        said = "\n".join(verify.check(folder, hashes=False)["problems"])
    except (ValueError, RuntimeError) as error:
        said = str(error)
    assert re.search(message, said), said


def test_two_families_in_folders_of_one_name_do_not_share_their_code(folders, tmp_path):
    for case in ("resampler", "mlp"):
        folder = tmp_path / case / "model"
        shutil.copytree(folders(f"hf-remote/{case}"), folder)
        assert verify.check(folder)["problems"] == []


def test_a_changed_file_is_named_before_anything_runs(folders, tmp_path):
    folder = spoiled(folders("hf-remote/mlp"), tmp_path)
    (folder / "modeling_tcjax_llava.py").write_text("raise SystemExit('executed')\n")
    assert verify.check(folder)["problems"] == [
        "hashes: modeling_tcjax_llava.py is not the file the manifest was written with"
    ]


def test_a_directory_that_disagrees_is_not_published(tmp_path, monkeypatch):
    run = REMOTE["mlp"]
    right = hf_folder.golden

    def wrong(*arguments):
        found = right(*arguments)
        return found | {"logits": found["logits"] * 1.01}

    monkeypatch.setattr(hf_folder, "golden", wrong)
    with pytest.raises(ValueError, match=r"nothing was exported:\nlogits: off by"):
        hf_remote.export(run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    assert list(tmp_path.iterdir()) == []


def test_the_chat_template_writes_the_prompt_of_training(folders):
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folders("hf-remote/resampler"), trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": "count red ?"}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<bos><image><user>count red ?<assistant>"
    image = np.zeros((30, 40, 3), np.uint8)  # any size
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == 2).sum() == 3
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)


def test_the_outer_tie_is_always_written(folders):
    for case, (run, _) in STOCK.items():
        config = json.loads((folders(f"hf/{case}") / "config.json").read_text())
        weights = tensors.load(folders(f"hf/{case}") / "model.safetensors")
        assert config["tie_word_embeddings"] is run.model.llm.tie
        assert any(name.endswith("lm_head.weight") for name in weights) is not run.model.llm.tie


@pytest.mark.slow
def test_positions_of_idefics_are_miscounted_where_the_table_says():
    """The class itself, with positions for weights: n x n patches of one pixel."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

    wrong = []
    for n in range(1, hf.COUNTED):
        config = Idefics3VisionConfig(image_size=n, patch_size=1, hidden_size=1, num_attention_heads=1)
        embeddings = Idefics3VisionEmbeddings(config)
        embeddings.position_embedding.weight.data = torch.arange(n * n, dtype=torch.float32)[:, None]
        embeddings.patch_embedding.bias.data.zero_()
        found = embeddings(torch.zeros(1, 3, n, n), torch.ones(1, n, n, dtype=torch.bool))[0, :, 0]
        if not torch.equal(found.detach(), torch.arange(n * n, dtype=torch.float32)):
            wrong.append(n)
    assert tuple(wrong) == hf.MISCOUNTED


WIDE = dataclasses.replace(TOWERS["siglip"], pixels=Pixels(size_YX=(16, 24)))
REFUSED = {  # why a stock class, then why remote code does not hold it
    "llava-norm": (a_run(mlp.Config()), r"reads SigLIP before its last norm", ""),
    "mlp-depth": (a_run(mlp.Config(depth=3), "clip"), r"has 2 linear layers, this one 3", ""),
    "no host": (a_run(RESAMPLER), r"no stock class computes resampler; hf-remote holds it", ""),
    "idefics-clip": (a_run(pixel_shuffle.Config(num_queries=4), "clip"), r"tower is CLIP, and the host has SigLIP", ""),
    "idefics-layer": (a_run(pixel_shuffle.Config(num_queries=4), "siglip-2"), r"behind the last norm", ""),
    "idefics2-width": (
        a_run(dataclasses.replace(IDEFICS2, projection=40)),
        r"as wide as the LLM's feed-forward, 32, this one 40",
        "",
    ),
    "idefics2-prefix": (a_run(IDEFICS2.at(2)), r"uses all of its 3 latents, this run 2", ""),
    "internvl-tower": (
        a_run(pixel_shuffle.Config(num_queries=4, head="mlp")),
        r"tower is SigLIP, and the host has InternViT",
        "",
    ),
    "unknown tower": (
        a_run(mlp.Config(), "internvit"),
        r"tower is InternViT or EVA-ViT, and the host has CLIP or SigLIP",
        r"tower is InternViT or EVA-ViT, and the host has CLIP or SigLIP",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused_with_the_reason(case):
    run, stock, remote = REFUSED[case]
    assert re.search(stock, hf.why_not(run))
    assert (re.search(remote, hf_remote.why_not(run)) if remote else hf_remote.why_not(run) == "") is not False


def test_towers_and_decoders_that_nobody_published_are_refused():
    def why(**changes) -> str:
        run = a_run(mlp.Config())
        return hf_remote.why_not(run.replace(model=dataclasses.replace(run.model, **changes)))

    assert "square images, this one 16 x 24" in why(tower=WIDE)
    assert "neither" not in why(tower=TOWERS["siglip"])
    llm = a_run(mlp.Config()).model.llm
    assert "no published decoder of qwen3" in why(llm=dataclasses.replace(llm, qkv_bias=True, qk_norm=True))


@pytest.mark.slow
@pytest.mark.fresh
def test_a_fresh_process_follows_the_readme(tmp_path):
    run = REMOTE["resampler"]
    folder = hf_remote.export(run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    readme = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    program = f"""
import sys
for package in ("jax", "jaxlib", "flax", "tcjax"):
    sys.modules[package] = None
import numpy
question, image = "count red ?", numpy.zeros((16, 16, 3), numpy.uint8)
{readme.group(1)}
print(answer.shape[1])
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "manifest.json").read_text())["parity"]["ran"]
