"""For a single GPU of 24 GB: SigLIP-B/16 (196 tokens) and Qwen2.5-0.5B-Instruct, 64 tokens, on LLaVA's data.

tcjax train configs/small.py --dry-run          memory, FLOPs, the first sample
tcjax train configs/small.py                    stage 1: captions, the compressor alone
tcjax export runs/small/pretrain --out runs/small/pretrain/artifact
tcjax train configs/small.py:finetune           stage 2: LoRA on the LLM
tcjax train configs/small.py:smollm             stage 1 with SmolLM2-135M-Instruct instead

Checkpoints: checkpoints/siglip-base-patch16-224, checkpoints/qwen2.5-0.5b-instruct, checkpoints/smollm2-135m-instruct.

Numbers: LLaVA-1.5's (configs/llava.py), the batches split into microbatches, our choice. Hours: not measured.
"""

from __future__ import annotations

from configs import llms, templates, towers
from configs.compressors import CATALOGUE
from configs.llava import INSTRUCT, PRETRAIN
from tcjax.config import DataConfig, LoraConfig, Run, Source, Template, TrainConfig
from tcjax.llms.decoder import LlmConfig
from tcjax.vlm import VlmConfig

SIGLIP, QWEN = "checkpoints/siglip-base-patch16-224", "checkpoints/qwen2.5-0.5b-instruct"
SMOLLM = "checkpoints/smollm2-135m-instruct"
QUERIES = 64


def run() -> Run:
    """Stage 1: 2,181 steps of 256 captions in 8 microbatches of 32 (hours not measured)."""
    train = TrainConfig(steps=2_181, peak_lr=1e-3, accumulate=8, remat="full", compute="bfloat16", frozen="bfloat16")
    return _run("pretrain", llms.qwen2_5_0_5b(QWEN), PRETRAIN, templates.QWEN, 256, 192, "rows", train)


def finetune() -> Run:
    """Stage 2: 5,198 steps of 128 conversations in microbatches of 8; LoRA of rank 64 (hours not measured)."""
    train = TrainConfig(
        steps=5_198,
        trainable=("compressor", "lora"),
        lora=LoraConfig(rank=64, alpha=128.0),
        peak_lr=2e-4,
        lr_of={"compressor": 2e-5},
        accumulate=16,
        remat="full",
        compute="bfloat16",
        frozen="bfloat16",
        weights={"compressor": "runs/small/pretrain/artifact"},
    )
    return _run("finetune", llms.qwen2_5_0_5b(QWEN), INSTRUCT, templates.QWEN, 128, 960, "grouped", train)


def smollm() -> Run:
    """Stage 1 with SmolLM2-135M-Instruct; it has no image token, so <|endoftext|> holds the images' places (hours not
    measured)."""
    train = TrainConfig(steps=2_181, peak_lr=1e-3, accumulate=4, remat="full", compute="bfloat16", frozen="bfloat16")
    return _run("smollm", llms.smollm2_135m(SMOLLM), PRETRAIN, templates.CHATML, 256, 192, "rows", train)


def _run(
    name: str,
    llm: LlmConfig,
    source: Source,
    template: Template,
    batch: int,
    text_length: int,
    batching: str,
    train: TrainConfig,
) -> Run:
    return Run(
        name=f"small/{name}",
        model=VlmConfig(tower=towers.siglip_b_224(SIGLIP), compressor=CATALOGUE["resampler"](QUERIES), llm=llm),
        data=DataConfig(
            sources=(source,),
            tokenizer=llm.weights,
            template=template,
            batch=batch,
            text_length=text_length,
            batching=batching,
            threads=8,
        ),
        train=train,
    )
