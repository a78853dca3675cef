"""A researcher's way through: downloaded CLIP and Llama, LLaVA's two files, two stages, a benchmark, and away to transformers.

Checkpoints are transformers' own with random weights, as `save_pretrained` lays them on disk, with only a tokenizer.model as
Vicuna has; the data has LLaVA's schema, text-only rows included.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from tcjax.cli import main
from tests import suite_files
from tests.chats import MODEL

pytestmark = pytest.mark.slow

CONFIG = '''"""LLaVA in small."""
from pathlib import Path

from configs.templates import PLAIN, VICUNA_V1
from tcjax.compressors import resampler
from tcjax.config import DataConfig, LoraConfig, Run, Source, TrainConfig
from tcjax.llms.published import llm
from tcjax.towers.published import tower
from tcjax.vlm import VlmConfig

ROOT = Path(__file__).parents[1]


def model():
    return VlmConfig(
        tower=tower("checkpoints/clip", root=ROOT, feature_layer=-2),
        compressor=resampler.Config(num_queries=4, depth=1, heads=2, head_width=8),
        llm=llm("checkpoints/vicuna", root=ROOT),
    )


def run() -> Run:
    """Stage 1. From nowhere; no hours."""
    return Run(
        name="stage1",
        model=model(),
        data=DataConfig(
            sources=(Source(path="data/captions.json"),),
            tokenizer="checkpoints/vicuna",
            template=PLAIN,
            batch=8,
            text_length=24,
            batching="packed",
            images=3,
        ),
        train=TrainConfig(steps=3, compute="bfloat16", frozen="bfloat16", remat="full"),
    )


def second() -> Run:
    """Stage 2, LoRA."""
    return Run(
        name="stage2",
        model=model(),
        data=DataConfig(
            sources=(Source(path="data/instruct.json"),),
            tokenizer="checkpoints/vicuna",
            template=VICUNA_V1,
            batch=8,
            text_length=120,
            batching="grouped",
            buckets=2,
        ),
        train=TrainConfig(
            steps=3,
            trainable=("compressor", "lora"),
            lora=LoraConfig(rank=2, alpha=4.0),
            lr_of={"compressor": 2e-4},
            weights={"compressor": "runs/stage1/artifact"},
        ),
    )
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPConfig(
        vision_config=vision | {"image_size": 32, "patch_size": 8}, text_config=text | {"vocab_size": 99}
    )
    transformers.CLIPModel(clip).save_pretrained(root / "checkpoints/clip")
    processor = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}}
    processor |= {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "resample": 3, "do_normalize": True}
    processor |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (root / "checkpoints/clip/preprocessor_config.json").write_text(json.dumps(processor))
    llama = transformers.LlamaConfig(
        vocab_size=800, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(root / "checkpoints/vicuna", max_shard_size="60KB")
    assert len(list((root / "checkpoints/vicuna").glob("model-*.safetensors"))) > 1
    shutil.copy(MODEL, root / "checkpoints/vicuna/tokenizer.model")
    marks = {"legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (root / "checkpoints/vicuna/tokenizer_config.json").write_text(json.dumps(marks))

    captions, instruct = [], []
    for i in range(12):
        suite_files.picture(root / f"data/00000/{i:09d}.jpg", i)
        asked = {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."}
        said = {"from": "gpt", "value": f"a red bus number {i}"}
        captions.append({"id": f"{i:09d}", "image": f"00000/{i:09d}.jpg", "conversations": [asked, said]})
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"A bus, number {i}."}]
        turns += [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."}]
        row = {"id": str(i), "image": f"00000/{i:09d}.jpg", "conversations": turns}
        if i % 3 == 0:
            row = {"id": f"text{i}", "model": "", "conversations": [turn | {} for turn in turns]}
            row["conversations"][0]["value"] = "Hello there."
        instruct.append(row)
    suite_files.write(root / "data/captions.json", captions)
    suite_files.write(root / "data/instruct.json", instruct)
    suite_files.write(root / "configs/small.py", CONFIG)
    shutil.copy("configs/templates.py", root / "configs/templates.py")
    suite_files.pope(root / "pope")
    return root


def ok(*words) -> None:
    assert main([str(word) for word in words]) == 0, words


def test_from_downloads_to_scores_and_out_again(project, capsys):
    config = project / "configs/small.py"
    for target in (config, f"{config}:second"):
        ok("data", "verify", "--config", target)
    ok("data", "preview", "--config", f"{config}:second", "--out", project / "page.html")
    assert "USER: " in (project / "page.html").read_text()
    ok("train", config, "--dry-run", "--mesh.data", "1")
    said = capsys.readouterr().out
    assert "a red bus number" in said and "12 visual" not in said

    ok("train", config, "--quiet")
    ok("export", project / "runs/stage1", "--out", project / "runs/stage1/artifact")
    ok("train", f"{config}:second", "--quiet")
    lines = [json.loads(line) for line in (project / "runs/stage2/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and np.isfinite(lines[-1]["loss"]) and 0 <= lines[-1]["padding_share"] < 1

    ok("evaluate", project / "runs/stage2", "--benchmark", "pope", "--files", project / "pope", "--mode", "llava")
    ok("generate", project / "runs/stage2", project / "data/00000/000000001.jpg", "What is it?", "--max-tokens", "4")
    ok("export", project / "runs/stage2", "--to", "llm", "--out", project / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(project / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(project / "checkpoints/vicuna")
    moved = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, plain.state_dict()[name])]
    assert moved and all("_proj" in name for name in moved), "LoRA's layers alone"


def test_another_frozen_checkpoint_is_refused_by_name(project, capsys):
    twin = project.parent / "another"
    shutil.copytree(project, twin)
    config = transformers.LlamaConfig.from_pretrained(twin / "checkpoints/vicuna")
    torch.manual_seed(7)
    for shard in (twin / "checkpoints/vicuna").glob("model*"):
        shard.unlink()
    transformers.LlamaForCausalLM(config).save_pretrained(twin / "checkpoints/vicuna")
    if not (twin / "runs/stage1").exists():
        ok("train", project / "configs/small.py", "--quiet")
        shutil.copytree(project / "runs", twin / "runs")
    capsys.readouterr()
    assert main(["train", str(twin / "configs/small.py"), "--quiet", "--train.steps", "5"]) == 2
    assert "llm.weights" in capsys.readouterr().err
