"""What an image costs: prefill FLOPs of tower, compressor and LLM, KV cache bytes, and useful training FLOPs.

    LLM at n tokens     2 L (n (2 D K A + 2 D J A + 3 D F) + 2 n^2 K A)          n = Q visual + T text tokens
    tower at S tokens   2 N P C + 2 L (S (4 C^2 + 2 C F) + 2 S^2 C)              S = N + class token + registers
    compressor          counted on its own jaxpr (tcjax/evaluate/flops.py), so a new compressor needs no formula
    KV cache            2 L J A n bytes_per_value

FLOPs are 2 * MACs: tables that print 3.8 "TFLOPs" for 576 tokens of Vicuna-7B print MACs. Attention counts all n^2
pairs, the literature's convention; causal skipping would halve that term. Embedding look-ups, norms and activations
are left out.

Training, per sample (Chowdhery et al. 2022, "PaLM", appendix B, extended to frozen parts): a matrix of weights costs
its forward once, once more where the gradient passes through to something that learns before it, and once more where
it learns itself: 6 N FLOPs per token if it learns, 4 N if it is frozen behind the compressor, 2 N before it. A LoRA of
U (in + out) weights beside a frozen kernel costs 6 U (in + out), the kernel 4 N; served, it is merged and costs nothing.
Attention has two moving sides: three times its forward wherever the gradient passes, once elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import CompressorConfig, Context, Widths
from tcjax.config import LoraConfig
from tcjax.evaluate.flops import matmul_flops
from tcjax.llms.decoder import LlmConfig
from tcjax.nn.lora import PART
from tcjax.towers.dual import DualConfig
from tcjax.towers.vit import VitConfig
from tcjax.vlm import VlmConfig

_INSTRUCTION = 32  # text tokens a query-conditioned compressor is counted with


class Flops(NamedTuple):
    """weights: multiplications with parameters. attention: between two activations."""

    weights: int
    attention: int

    @property
    def total(self) -> int:
        return self.weights + self.attention


class Cost(NamedTuple):
    """Of one image with its question, up to the first answer token.

    visual_tokens: Q. text_tokens: T. ratio: N / Q. tower_flops, compressor_flops, llm_flops: forward; the LLM's include
    the head at the last position. kv_bytes: cache of the Q + T tokens; visual_kv_bytes: of the Q alone.
    """

    visual_tokens: int
    text_tokens: int
    ratio: float
    tower_flops: int
    compressor_flops: int
    llm_flops: int
    kv_bytes: int
    visual_kv_bytes: int

    @property
    def prefill_flops(self) -> int:
        return self.tower_flops + self.compressor_flops + self.llm_flops


def cost(config: VlmConfig, text_tokens: int, bytes_per_value: int = 2) -> Cost:
    """The whole bill of a model at `text_tokens` beside the image. bytes_per_value: of the cache, 2 for bfloat16."""
    Q, N = config.num_queries, config.tower.num_tokens  # as the tower would give them by itself
    llm = llm_flops(config.llm, Q + text_tokens).total + head_flops(config.llm, 1)
    return Cost(
        visual_tokens=Q,
        text_tokens=text_tokens,
        ratio=N / Q,
        tower_flops=tower_flops(config.seen).total,
        compressor_flops=compressor_flops(config.compressor, config.widths),  # pyright: ignore[reportArgumentType]
        llm_flops=llm,
        kv_bytes=kv_cache_bytes(Q + text_tokens, config.llm, bytes_per_value),
        visual_kv_bytes=kv_cache_bytes(Q, config.llm, bytes_per_value),
    )


def llm_flops(llm: LlmConfig, tokens: int) -> Flops:
    """Blocks only, without the head. 576 tokens of Vicuna-7B: 2 * 3.817e12."""
    n, D, A = tokens, llm.width, llm.head_width
    per_token = 2 * D * llm.heads * A + 2 * D * llm.kv_heads * A + 3 * D * llm.feed_forward
    return Flops(2 * llm.layers * n * per_token, 2 * llm.layers * 2 * n**2 * llm.heads * A)


def lora_flops(llm: LlmConfig, lora: LoraConfig, tokens: int) -> int:
    """Forward of the updates, not merged: 2 U (in + out) per token and layer that has one."""
    D, F, E, I = llm.width, llm.feed_forward, llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    both = {"query": D + E, "key": D + I, "value": D + I, "out": E + D, "gate": D + F, "up": D + F, "down": F + D}
    return 2 * tokens * llm.layers * lora.rank * sum(both[target] for target in set(lora.targets))


def head_flops(llm: LlmConfig, positions: int) -> int:
    """Logits over the vocabulary: at 1 position to generate, at every position to train."""
    return 2 * positions * llm.width * llm.vocab


def tower_flops(tower: VitConfig | DualConfig) -> Flops:
    """The blocks that are run, and the patch embedding. All 24 blocks of CLIP-L/336 at 577 tokens: 2 * 190.6e9.

    An image of any shape counts as the most patches it can have, a dual tower as both.
    """
    if isinstance(tower, DualConfig):
        first, second = map(tower_flops, tower.towers)
        return Flops(first.weights + second.weights, first.attention + second.attention)
    (H, W), C, L = tower.grid_HW, tower.width, tower.num_blocks
    N = H * W
    S = N + tower.num_prefix
    embedding = 2 * N * 3 * tower.patch**2 * C
    blocks = 2 * L * S * (4 * C**2 + 2 * C * tower.feed_forward)
    return Flops(embedding + blocks, 2 * L * 2 * S**2 * C)


@cache
def compressor_flops(config: CompressorConfig, widths: Widths) -> int:
    """One image through the compressor, built abstractly: no weights, whatever the size."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0))))
    N, T = widths.num_tokens, _INSTRUCTION

    def compress(state, tokens_BNC, text_BTD, levels_BNE, prior_BN):
        context = Context(text_BTD=text_BTD, levels_BNE=levels_BNE, prior_BN=prior_BN)
        return nnx.merge(graphdef, state)(tokens_BNC, context).tokens_BQD

    shapes = (1, N, widths.vision_C), (1, T, widths.text_D), (1, N, widths.levels * widths.vision_C), (1, N)
    return matmul_flops(compress, state, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def kv_cache_bytes(tokens: int, llm: LlmConfig, bytes_per_value: int = 2) -> int:
    """Memory one sequence holds while decoding: 2 * layers * kv_heads * A * tokens * bytes.

    Args:
        tokens: visual plus text positions in the cache.
        llm: read for layers, key/value heads (not query heads) and head width A.
        bytes_per_value: 2 for bfloat16.

    Returns:
        Bytes; 576 tokens of Vicuna-7B take 301_989_888 (288 MiB).
    """
    return 2 * llm.layers * llm.kv_heads * llm.head_width * tokens * bytes_per_value


def training_flops(
    config: VlmConfig,
    text_tokens: int,
    trainable: Sequence[str] = ("compressor",),
    *,
    lora: LoraConfig = LoraConfig(),
    supervised: int | None = None,
    cached_features: bool = False,
) -> int:
    """Useful FLOPs of one sample's step: what the mathematics needs, nothing recomputed, no padding.

    Args:
        text_tokens: all positions that are not visual.
        trainable: parts that learn, as in `TrainConfig.trainable`. lora: as in `TrainConfig.lora`.
        supervised: positions that meet the vocabulary; None is all of them, visual ones too.
        cached_features: the tower's tokens come from the feature cache, so the tower costs nothing.
    """
    compressor: CompressorConfig = config.compressor  # pyright: ignore[reportAssignmentType]
    sequences = [Q + text_tokens for Q in config.averaged_over or (config.num_queries,)]
    each = [llm_flops(config.llm, S) for S in sequences]
    asked = sum(sequences) if supervised is None else len(sequences) * supervised
    blocks = Flops(sum(flops.weights for flops in each), sum(flops.attention for flops in each))
    # The compressor's few attention FLOPs count as weights: it nearly always learns, and then both weigh 3.
    parts = {
        "tower": Flops(0, 0) if cached_features else tower_flops(config.seen),
        "compressor": Flops(compressor_flops(compressor, config.widths), 0),
        **({PART: Flops(lora_flops(config.llm, lora, sum(sequences)), 0)} if lora.rank else {}),  # inside the LLM
        "llm": Flops(blocks.weights + head_flops(config.llm, asked), blocks.attention),
    }
    unknown = sorted(set(trainable) - set(parts))
    if unknown:
        raise ValueError(f"trainable={tuple(trainable)} names {unknown}; the parts are {list(parts)}.")
    total, passes = 0, False
    for name, flops in parts.items():  # from the image to the answer; the gradient comes the other way
        learns = name in trainable
        passes = passes or learns
        total += flops.weights * (1 + passes + learns) + flops.attention * (1 + 2 * passes)
    return total
