"""Small trained models for the tests of tcjax.export's targets: a run that could have been, its model and its identity."""

import dataclasses
from pathlib import Path
from typing import Any

from tcjax.config import DataConfig, Pixels, Run, Source, TrainConfig
from tcjax.llms.decoder import LlmConfig
from tcjax.llms.rope import Llama3Scaling
from tcjax.towers.vit import VitConfig
from tcjax.vlm import Vlm, VlmConfig
from tests import tiny
from tests.planted import planted

ROOT = Path(__file__).parents[1]
TOKENIZER = "configs/boards_base/tokenizer.json"  # 64 words

SIGLIP = dataclasses.replace(tiny.TOWER, layers=2, activation="gelu_pytorch_tanh")  # 4 x 4 tokens of width 16
CLIP = dataclasses.replace(
    SIGLIP,
    pixels=Pixels(size_YX=(18, 18), mean=(0.48, 0.45, 0.4), std=(0.27, 0.26, 0.28)),  # 18 = 4 * 4 + 2
    activation="quick_gelu",
    norm_eps=1e-5,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    post_norm=False,
    feature_layer=-2,
)
INTERNVIT = dataclasses.replace(SIGLIP, class_token=True, post_norm=False, activation="gelu")
TOWERS: dict[str, VitConfig] = {
    "siglip": SIGLIP,
    "siglip-2": dataclasses.replace(SIGLIP, feature_layer=-2),
    "clip": CLIP,
    "internvit": INTERNVIT,
    "eva": dataclasses.replace(INTERNVIT, post_norm=True),  # BLIP-2's
}
LLAMA = dataclasses.replace(tiny.LLM, vocab=64)
LLMS: dict[str, LlmConfig] = {
    "llama": LLAMA,
    "llama3": dataclasses.replace(LLAMA, tie=False, rope_scaling=Llama3Scaling(factor=8.0, original=32)),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, tie=False, head_width=12),  # 2 * 12 is not 16
}
IDENTITY = {"tower.weights": "random from seed 0", "llm.weights": "random from seed 0"}


def a_run(compressor: Any, tower: str = "siglip", llm: str = "llama") -> Run:
    """A run that trains this compressor between these two."""
    return Run(
        name=f"hosted/{tower}-{llm}",
        model=VlmConfig(tower=TOWERS[tower], compressor=compressor, llm=LLMS[llm]),
        data=DataConfig(sources=(Source(path="none"),), tokenizer=TOKENIZER),
        train=TrainConfig(steps=6),
    )


def a_model(run: Run) -> Vlm:
    """Every weight planted, so that none hides behind an initial 0 or 1."""
    return planted(run.model)  # pyright: ignore[reportReturnType]
