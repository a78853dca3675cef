"""Published LLMs by their checkpoints' own numbers; `weights` is the path of their safetensors."""

from __future__ import annotations

from tcjax.llms.decoder import LlmConfig
from tcjax.llms.rope import Llama3Scaling


def vicuna_7b(weights: str = "") -> LlmConfig:
    """lmsys/vicuna-7b-v1.5, a Llama-2-7B: 6,738,415,616 parameters."""
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


def qwen2_5_0_5b(weights: str = "") -> LlmConfig:
    """Qwen/Qwen2.5-0.5B: 494,032,768 parameters."""
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
