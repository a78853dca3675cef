"""Prismatic's single stage: DINOv2 and SigLIP side by side (729 tokens of width 2176), Llama-2-7B, no alignment stage.

tcjax train configs/prismatic.py --dry-run
tcjax train configs/prismatic.py                prism-dinosiglip-controlled+7b, with a resampler instead of its MLP

Checkpoints: checkpoints/dinov2-with-registers-large, checkpoints/siglip-so400m-patch14-384, checkpoints/llama-2-7b-hf.

Numbers: TRI-ML/prismatic-vlms, conf/models.py (Exp_7B_One_Stage, Prism_7B_DINOSigLIP_Controlled): compressor and LLM from the
start on LLaVA's 665k conversations, batch 128, peak 2e-5, warm-up .03, weight decay 0.1 on matrices, clip 1, one epoch, seed
7, images squashed to 384 ("resize-naive"). It names no hours; its paper says a single stage saves 20 to 25 % of the compute
(second-hand).

Departures: its MLP (2176 -> 8704 -> 4096 -> 4096) is replaced, that is what tcjax is for.
"""

from __future__ import annotations

from configs import llms, templates, towers
from configs.compressors import CATALOGUE
from configs.llava import INSTRUCT, SEQUENCE
from tcjax.config import DataConfig, MeshConfig, Run, TrainConfig
from tcjax.vlm import VlmConfig

DINOV2, SIGLIP = "checkpoints/dinov2-with-registers-large", "checkpoints/siglip-so400m-patch14-384"
LLAMA = "checkpoints/llama-2-7b-hf"


def run(num_queries: int = 64) -> Run:
    """prism-dinosiglip-controlled+7b with a resampler: 729 -> 64 tokens, 5,198 steps of 128 (no hours given)."""
    return Run(
        name=f"prismatic/dinosiglip-7b-{num_queries}",
        model=VlmConfig(
            tower=towers.dinosiglip_384(DINOV2, SIGLIP),
            compressor=CATALOGUE["resampler"](num_queries),
            llm=llms.llama_2_7b(LLAMA),
        ),
        data=DataConfig(
            sources=(INSTRUCT,),
            tokenizer=LLAMA,
            template=templates.PRISMATIC_BASE,
            batch=128,
            text_length=SEQUENCE - num_queries,
            batching="grouped",
            seed=7,
            threads=16,
        ),
        train=TrainConfig(
            steps=5_198,
            trainable=("compressor", "llm"),
            peak_lr=2e-5,
            weight_decay=0.1,
            seed=7,
            remat="full",
            compute="bfloat16",
            frozen="bfloat16",
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
