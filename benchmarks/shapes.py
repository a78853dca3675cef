"""The models that benchmarks of whole steps and prompts run: LLaVA-1.5's parts at four sizes, with random weights.

    7b, 13b   CLIP-L/336 (576 tokens of width 1024), a compressor, Vicuna-7B or -13B
    0.5b      the same tower, Qwen2.5-0.5B
    tiny      64 tokens of width 128 and two blocks of everything: to prove on a CPU that a benchmark works

Weights are drawn where they lie, one leaf after the other: neither the host nor the device ever holds a second copy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs import llms, towers
from configs.compressors import CATALOGUE
from tcjax.assemble import assemble
from tcjax.batch import Batch
from tcjax.config import MeshConfig, Pixels
from tcjax.plan.chips import CHIPS
from tcjax.sharding import make_mesh
from tcjax.vlm import VlmConfig

CLIP, VICUNA = towers.clip_l_336(), llms.vicuna_7b()
SIZES = {
    "tiny": (
        replace(CLIP, pixels=replace(CLIP.pixels, size_YX=(112, 112)), width=128, layers=3, heads=2, feed_forward=256),
        replace(VICUNA, vocab=512, width=128, layers=2, heads=2, kv_heads=2, head_width=64, feed_forward=256),
    ),
    "0.5b": (CLIP, llms.qwen2_5_0_5b()),
    "7b": (CLIP, VICUNA),
    "13b": (CLIP, llms.vicuna_13b()),
}


def peak_of(device_kind: str) -> float:
    """TFLOP/s in bfloat16 of a device of this name, as the planner counts with; 0 if it is not known."""
    return next((chip.flops / 1e12 for chip in CHIPS.values() if chip.device_kind == device_kind), 0.0)


def shape(size: str, num_queries: int, compressor: str = "resampler") -> VlmConfig:
    """The model of a size with that many visual tokens."""
    tower, llm = SIZES[size]
    return VlmConfig(tower=tower, compressor=CATALOGUE[compressor](num_queries), llm=llm)


def one_device() -> Mesh:
    """The first device alone."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def random_model(config: VlmConfig, dtype: str, mesh: Mesh) -> Any:
    """Tower and LLM in `dtype`, the compressor in float32, as a training has them."""
    return assemble(config, root=Path("."), mesh=mesh, trainable=("compressor",), frozen=dtype)[0]


def random_batch(config: VlmConfig, batch: int, text: int, supervised: int, seed: int = 0) -> Batch:
    """Rows of Q visual and `text` other tokens, of which the last `supervised` are targets; pixels as files have them."""
    random, Q = np.random.default_rng(seed), config.num_queries
    S = Q + text
    pixels: Pixels = config.one_tower.pixels
    return Batch(
        tokens_BS=random.integers(0, config.llm.vocab, (batch, S)).astype(np.int32),
        is_image_BS=np.broadcast_to(np.arange(S) < Q, (batch, S)).copy(),
        supervised_BS=np.broadcast_to(np.arange(S) >= S - supervised, (batch, S)).copy(),
        valid_BS=np.ones((batch, S), bool),
        index_B=np.arange(batch, dtype=np.int32),
        images_BYX3=random.integers(0, 256, (batch, *pixels.size_YX, 3)).astype(np.uint8),
    )
