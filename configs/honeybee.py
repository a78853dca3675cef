"""Honeybee-C-7B-M144: CLIP-L/14 at 224 (256 tokens, last layer), a C-Abstractor of 144 tokens, Vicuna-7B v1.5.

tcjax train configs/honeybee.py:pretrain        the abstractor alone, captions
tcjax export runs/honeybee/pretrain --out runs/honeybee/pretrain/artifact
tcjax train configs/honeybee.py:finetune        abstractor and LLM, 13 sets

Numbers: kakaobrain/honeybee, configs/{default,pretrain,finetune}.yaml and data_config/*: AdamW, betas .9/.98, eps 1e-6,
cosine, clip 1, bfloat16. It names no hours. Images are squashed to 224 x 224.

Data: web-dataset tars of captions (data/blip_captions/README.md); for finetuning each of its 13 sets as LLaVA's JSON below
data/honeybee. It parses the sets' own files and writes its own questions (10 per image of VQAv2, say): converting them is
the user's, and scores depend on it. Weights of the mixture are its own.
"""

from __future__ import annotations

from dataclasses import replace

from configs import llms, templates, towers
from tcjax.compressors import c_abstractor
from tcjax.config import DataConfig, MeshConfig, Run, Source, Template, TrainConfig
from tcjax.vlm import VlmConfig

CLIP, VICUNA = "checkpoints/clip-vit-large-patch14", "checkpoints/vicuna-7b-v1.5"
CAPTIONS = (
    Source(path="data/blip_captions/blip", weight=0.5),
    Source(path="data/blip_captions/coyo", weight=0.5),
)
WEIGHTS = {
    "coyo100m": 0.077,
    "vqa": 0.103,
    "gqa": 0.103,
    "ocrvqa": 0.051,
    "vsr": 0.026,
    "sqa": 0.051,
    "aokvqa": 0.103,
    "refcoco": 0.103,
    "refcoco+": 0.103,
    "refcocog": 0.103,
    "vgloc": 0.051,
    "llava150k": 0.103,
    "vicuna40k": 0.026,
}


def pretrain() -> Run:
    """50,000 steps of 256 captions, peak 1e-4 down to 1e-5, warm-up 2,000; the abstractor alone (no hours given)."""
    train = _train(steps=50_000, warmup=2_000, peak_lr=1e-4, end_lr=1e-5, weight_decay=0.01, trainable=("compressor",))
    return _run("pretrain", CAPTIONS, templates.HONEYBEE_PRETRAIN, 256, 1024, train)


def finetune() -> Run:
    """4,000 steps of 128 (its short schedule), peak 2e-5 down to 1e-6, warm-up 150; abstractor and LLM (no hours given)."""
    sources = tuple(
        Source(path=f"data/honeybee/{name}.json", images="data/honeybee/images", weight=weight)
        for name, weight in WEIGHTS.items()
    )
    train = _train(
        steps=4_000, warmup=150, peak_lr=2e-5, end_lr=1e-6, weight_decay=1e-4, trainable=("compressor", "llm")
    )
    train = replace(train, weights={"compressor": "runs/honeybee/pretrain/artifact"})
    return _run("finetune", sources, templates.HONEYBEE, 128, 1023, train)


def _train(*, steps: int, warmup: int, **changes) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        warmup=warmup / steps,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        seed=42,
        remat="full",
        compute="bfloat16",
        frozen="bfloat16",
        **changes,
    )


def _run(
    name: str, sources: tuple[Source, ...], template: Template, batch: int, length: int, train: TrainConfig
) -> Run:
    tower = towers.clip_l_224(CLIP, feature_layer=-1, geometry="squash")
    compressor = c_abstractor.Config(num_queries=144)
    return Run(
        name=f"honeybee/{name}",
        model=VlmConfig(tower=tower, compressor=compressor, llm=llms.vicuna_7b(VICUNA)),
        data=DataConfig(
            sources=sources,
            tokenizer=VICUNA,
            template=template,
            batch=batch,
            text_length=length - compressor.num_queries,
            seed=42,
            threads=16,
        ),
        train=train,
        mesh=MeshConfig(data=1, fsdp=-1),
    )
