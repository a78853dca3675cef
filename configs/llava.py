"""LLaVA-1.5's two stages, with a compressor where LLaVA has its MLP. CLIP-L/336 (576 tokens, layer -2), Vicuna v1.5.

tcjax train configs/llava.py:pretrain_7b --dry-run          what it would cost; nothing is loaded
tcjax train configs/llava.py:pretrain_7b                    stage 1: captions, the compressor alone
tcjax export runs/llava/pretrain-7b --out runs/llava/pretrain-7b/artifact
tcjax train configs/llava.py:finetune_7b                    stage 2: compressor and LLM; or lora_7b
tcjax evaluate runs/llava/finetune-7b --benchmark pope --files data/pope --mode llava

Checkpoints: checkpoints/clip-vit-large-patch14-336, checkpoints/vicuna-7b-v1.5 and -13b-v1.5, as downloaded. Data:
data/llava_pretrain, data/llava_instruct (their README says how to get it).

Numbers: haotian-liu/LLaVA, scripts/v1_5/{pretrain,finetune,finetune_lora}.sh: AdamW, betas .9/.999, cosine to 0, warm-up
.03, weight decay 0, clip 1, bfloat16, one epoch. Its README: on 8 A100-80G stage 1 takes 3.5 hours (7B) and 5.5 (13B), stage
2 about 10 (7B, quoted for A100-40G) and 20 (13B), with the MLP's 576 tokens. Ours have not been run at this size; at 64
tokens a stage-1 sequence is about 7 times shorter.

Departures: sequences hold 2048 positions as there, but too long conversations lose whole turns instead of being cut; the
pretraining captions have 256 positions (longer ones are cut and counted). In stage 2 images
are padded, as there.
"""

from __future__ import annotations

from configs import llms, templates, towers
from configs.compressors import CATALOGUE
from tcjax.compressors import mlp
from tcjax.config import DataConfig, LoraConfig, MeshConfig, Run, Source, Template, TrainConfig
from tcjax.vlm import VlmConfig

CLIP = "checkpoints/clip-vit-large-patch14-336"
VICUNA = {"7b": "checkpoints/vicuna-7b-v1.5", "13b": "checkpoints/vicuna-13b-v1.5"}
PRETRAIN = Source(path="data/llava_pretrain/blip_laion_cc_sbu_558k.json")  # 558,128 captions
INSTRUCT = Source(path="data/llava_instruct/llava_v1_5_mix665k.json", images="data/llava_instruct")  # 665,298
SEQUENCE = 2048


def stage_one(size: str, compressor: object, name: str) -> Run:
    """2,181 steps of 256: every caption once. Only the compressor learns."""
    return Run(
        name=f"llava/pretrain-{name}",
        model=_model(size, compressor, "crop"),
        data=_data(size, PRETRAIN, templates.PLAIN, batch=256, text_length=256),
        train=TrainConfig(steps=2_181, peak_lr=1e-3, remat="full", compute="bfloat16", frozen="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def stage_two(size: str, compressor: object, name: str, lora: LoraConfig = LoraConfig()) -> Run:
    """5,198 steps of 128: every conversation once. The compressor goes on from stage 1; the LLM learns too, or its LoRA."""
    model = _model(size, compressor, "pad")
    train = TrainConfig(
        steps=5_198,
        trainable=("compressor", "llm"),
        peak_lr=2e-5,
        remat="full",
        compute="bfloat16",
        frozen="bfloat16",
        weights={"compressor": f"runs/llava/pretrain-{name}/artifact"},
    )
    kind = "finetune"
    if lora.rank:
        kind = "lora"
        train = TrainConfig(
            steps=5_198,
            trainable=("compressor", "lora"),
            lora=lora,
            peak_lr=2e-4,
            lr_of={"compressor": 2e-5},
            remat="full",
            compute="bfloat16",
            frozen="bfloat16",
            weights=train.weights,
        )
    return Run(
        name=f"llava/{kind}-{name}",
        model=model,
        data=_data(
            size, INSTRUCT, templates.VICUNA_V1, batch=128, text_length=SEQUENCE - model.num_queries, grouped=True
        ),
        train=train,
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def pretrain_7b() -> Run:
    """LLaVA-1.5-7B, stage 1, with a resampler: 576 -> 64 tokens. LLaVA's MLP: 3.5 hours on 8 A100-80G (its README)."""
    return stage_one("7b", CATALOGUE["resampler"](64), "7b")


def pretrain_13b() -> Run:
    """LLaVA-1.5-13B, stage 1, with a resampler: 576 -> 64 tokens. LLaVA's MLP: 5.5 hours on 8 A100-80G (its README)."""
    return stage_one("13b", CATALOGUE["resampler"](64), "13b")


def finetune_7b() -> Run:
    """LLaVA-1.5-7B, stage 2: compressor and LLM. LLaVA's MLP: about 10 hours on 8 A100 (its README)."""
    return stage_two("7b", CATALOGUE["resampler"](64), "7b")


def finetune_13b() -> Run:
    """LLaVA-1.5-13B, stage 2: compressor and LLM. LLaVA's MLP: about 20 hours on 8 A100-80G (its README)."""
    return stage_two("13b", CATALOGUE["resampler"](64), "13b")


def lora_7b() -> Run:
    """LLaVA-1.5-7B, stage 2 with LoRA: rank 128, alpha 256 at 2e-4, the compressor at 2e-5 (finetune_lora.sh; no hours given)."""
    return stage_two("7b", CATALOGUE["resampler"](64), "7b", LoraConfig(rank=128, alpha=256.0))


def lora_13b() -> Run:
    """LLaVA-1.5-13B, stage 2 with LoRA: as lora_7b (finetune_lora.sh, whose model it is; no hours given)."""
    return stage_two("13b", CATALOGUE["resampler"](64), "13b", LoraConfig(rank=128, alpha=256.0))


def pretrain_7b_mlp() -> Run:
    """LLaVA-1.5-7B as published, stage 1: the MLP, 576 tokens. 3.5 hours on 8 A100-80G (its README)."""
    return stage_one("7b", mlp.Config(), "7b-mlp")


def finetune_7b_mlp() -> Run:
    """LLaVA-1.5-7B as published, stage 2 (about 10 hours on 8 A100). VQAv2 78.5, GQA 62.0, TextVQA 58.2, POPE 85.9."""
    return stage_two("7b", mlp.Config(), "7b-mlp")


def _model(size: str, compressor: object, geometry: str) -> VlmConfig:
    llm = {"7b": llms.vicuna_7b, "13b": llms.vicuna_13b}[size]
    return VlmConfig(tower=towers.clip_l_336(CLIP, geometry=geometry), compressor=compressor, llm=llm(VICUNA[size]))


def _data(size: str, source: Source, template: Template, *, batch: int, text_length: int, grouped=False) -> DataConfig:
    return DataConfig(
        sources=(source,),
        tokenizer=VICUNA[size],
        template=template,
        batch=batch,
        text_length=text_length,
        batching="grouped" if grouped else "rows",
        threads=16,
    )
