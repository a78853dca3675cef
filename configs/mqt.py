"""MQT-LLaVA: one training for every number of tokens up to 256, on LLaVA-1.5's data and models.

tcjax train configs/mqt.py:pretrain             stage 1: all 256 queries
tcjax export runs/mqt/pretrain --out runs/mqt/pretrain/artifact
tcjax train configs/mqt.py:finetune             stage 2: m drawn from 2, 4, ..., 256 at every step, two epochs
tcjax evaluate runs/mqt/finetune --queries 256,64,16

Numbers: gordonhu608/MQT-LLaVA, its scripts: LLaVA-1.5's, but two epochs of stage 2. 4 and 30 hours on 8 A6000 (second-hand).
Departure: there every process draws its own m, here a step has one.
"""

from __future__ import annotations

from dataclasses import replace

from configs.compressors import CATALOGUE
from configs.llava import stage_one, stage_two
from tcjax.config import Run


def pretrain() -> Run:
    """Stage 1: 2,181 steps of 256 captions with all 256 queries; the compressor alone. 4 hours on 8 A6000 (second-hand)."""
    return stage_one("7b", CATALOGUE["matryoshka_query"](256), "7b").replace(name="mqt/pretrain")


def finetune() -> Run:
    """Stage 2: two epochs of 665k conversations, m drawn anew at every step. 30 hours on 8 A6000 (second-hand)."""
    run = stage_two("7b", CATALOGUE["mqt"](256), "7b")
    weights = {"compressor": "runs/mqt/pretrain/artifact"}
    return run.replace(name="mqt/finetune", train=replace(run.train, steps=2 * run.train.steps, weights=weights))
