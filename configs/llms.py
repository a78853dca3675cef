"""Published LLMs by their checkpoints' own numbers; `weights` is the path of their safetensors.

`tcjax.llms.published.llm(folder)` reads the same numbers from a downloaded config.json, for these and their relatives.
"""

from __future__ import annotations

from dataclasses import replace

from tcjax.llms.decoder import LlmConfig
from tcjax.llms.rope import Llama3Scaling


def llama_2_7b(weights: str = "") -> LlmConfig:
    """meta-llama/Llama-2-7b-hf: 6,738,415,616 parameters."""
    return LlmConfig(
        vocab=32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_width=128,
        feed_forward=11_008,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie=False,
        weights=weights,
    )


def vicuna_7b(weights: str = "") -> LlmConfig:
    """lmsys/vicuna-7b-v1.5, a Llama-2-7B: 6,738,415,616 parameters."""
    return llama_2_7b(weights)


def vicuna_13b(weights: str = "") -> LlmConfig:
    """lmsys/vicuna-13b-v1.5, a Llama-2-13B: 13,015,864,320 parameters."""
    return replace(llama_2_7b(weights), width=5120, layers=40, heads=40, kv_heads=40, feed_forward=13_824)


def llama_3_8b(weights: str = "") -> LlmConfig:
    """meta-llama/Meta-Llama-3-8B, 8192 positions: 8,030,261,248 parameters."""
    return LlmConfig(
        vocab=128_256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_width=128,
        feed_forward=14_336,
        rope_theta=5e5,
        norm_eps=1e-5,
        tie=False,
        weights=weights,
    )


def llama_3_70b(weights: str = "") -> LlmConfig:
    """meta-llama/Meta-Llama-3-70B, 8192 positions: 70,553,706,496 parameters."""
    return replace(llama_3_8b(weights), width=8192, layers=80, heads=64, feed_forward=28_672)


def llama_3_1_8b(weights: str = "") -> LlmConfig:
    """meta-llama/Llama-3.1-8B, Llama-3-8B stretched to 131,072 positions: 8,030,261,248 parameters."""
    return replace(llama_3_8b(weights), rope_scaling=Llama3Scaling(factor=8.0))


def llama_3_2_1b(weights: str = "") -> LlmConfig:
    """meta-llama/Llama-3.2-1B: 1,235,814,400 parameters."""
    return LlmConfig(
        vocab=128_256,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_width=64,
        feed_forward=8192,
        rope_theta=5e5,
        rope_scaling=Llama3Scaling(factor=32.0),
        norm_eps=1e-5,
        tie=True,
        weights=weights,
    )


def llama_3_2_3b(weights: str = "") -> LlmConfig:
    """meta-llama/Llama-3.2-3B: 3,212,749,824 parameters."""
    return replace(llama_3_2_1b(weights), width=3072, layers=28, heads=24, head_width=128)


def mistral_7b_v0_1(weights: str = "") -> LlmConfig:
    """mistralai/Mistral-7B-v0.1, every position sees 4096: 7,241,732,096 parameters."""
    return LlmConfig(
        vocab=32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_width=128,
        feed_forward=14_336,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie=False,
        window=4096,
        weights=weights,
    )


def mistral_7b_v0_2(weights: str = "") -> LlmConfig:
    """mistralai/Mistral-7B-Instruct-v0.2, no window: 7,241,732,096 parameters."""
    return replace(mistral_7b_v0_1(weights), rope_theta=1e6, window=None)


def mistral_7b_v0_3(weights: str = "") -> LlmConfig:
    """mistralai/Mistral-7B-v0.3, 768 more words: 7,248,023,552 parameters."""
    return replace(mistral_7b_v0_2(weights), vocab=32_768)


def qwen2_0_5b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen2-0.5B: 494,032,768 parameters."""
    return LlmConfig(
        vocab=151_936,
        width=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_width=64,
        feed_forward=4864,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie=True,
        qkv_bias=True,
        weights=weights,
    )


def qwen2_1_5b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen2-1.5B: 1,543,714,304 parameters."""
    return replace(qwen2_0_5b(weights), width=1536, layers=28, heads=12, head_width=128, feed_forward=8960)


def qwen2_7b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen2-7B, whose embedding has 128 rows more than its smaller siblings': 7,615,616,512 parameters."""
    return LlmConfig(
        vocab=152_064,
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_width=128,
        feed_forward=18_944,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie=False,
        qkv_bias=True,
        weights=weights,
    )


def qwen2_5_0_5b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen2.5-0.5B, the shape of Qwen2-0.5B: 494,032,768 parameters."""
    return qwen2_0_5b(weights)


def qwen2_5_1_5b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen2.5-1.5B, the shape of Qwen2-1.5B: 1,543,714,304 parameters."""
    return qwen2_1_5b(weights)


def qwen2_5_7b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen2.5-7B, the shape of Qwen2-7B: 7,615,616,512 parameters."""
    return qwen2_7b(weights)


def qwen3_0_6b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen3-0.6B: 596,049,920 parameters; queries are 16 * 128 = 2048 wide, twice the model."""
    return LlmConfig(
        vocab=151_936,
        width=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_width=128,
        feed_forward=3072,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie=True,
        qk_norm=True,
        weights=weights,
    )


def qwen3_1_7b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen3-1.7B: 1,720,574,976 parameters."""
    return replace(qwen3_0_6b(weights), width=2048, feed_forward=6144)


def qwen3_8b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen3-8B: 8,190,735,360 parameters."""
    return replace(qwen3_0_6b(weights), width=4096, layers=36, heads=32, feed_forward=12_288, tie=False)


def smollm2_135m(weights: str = "") -> LlmConfig:
    """HuggingFaceTB/SmolLM2-135M: 134,515,008 parameters."""
    return LlmConfig(
        vocab=49_152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_width=64,
        feed_forward=1536,
        rope_theta=1e5,
        norm_eps=1e-5,
        tie=True,
        weights=weights,
    )


def smollm2_360m(weights: str = "") -> LlmConfig:
    """HuggingFaceTB/SmolLM2-360M: 361,821,120 parameters."""
    return replace(smollm2_135m(weights), width=960, layers=32, heads=15, kv_heads=5, feed_forward=2560)


def smollm2_1_7b(weights: str = "") -> LlmConfig:
    """HuggingFaceTB/SmolLM2-1.7B, ungrouped, 8192 positions: 1,711,376,384 parameters."""
    return replace(
        smollm2_135m(weights), width=2048, layers=24, heads=32, kv_heads=32, feed_forward=8192, rope_theta=1.3e5
    )
