"""The same models in PyTorch: transformers' classes at a config's numbers, and a compressor's exported twin.

They are made with random weights on the device and in the type that torch's defaults say at the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tcjax.assemble import published_names
from tcjax.compressors.base import CompressorConfig, Widths
from tcjax.export.families import describe, twin_source
from tcjax.interop import names
from tcjax.llms.decoder import LlmConfig
from tcjax.towers.vit import VitConfig


def tower_twin(cfg: VitConfig) -> Any:
    """CLIP's tower up to the layer that is read: what lies behind is run on neither side."""
    return (
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=cfg.width,
                intermediate_size=cfg.feed_forward,
                num_hidden_layers=cfg.num_blocks,
                num_attention_heads=cfg.heads,
                image_size=cfg.pixels.size_YX[0],
                patch_size=cfg.patch,
                hidden_act=cfg.activation,
                layer_norm_eps=cfg.norm_eps,
                attn_implementation="sdpa",
            )
        )
        .eval()
        .requires_grad_(False)
    )


def llm_twin(cfg: LlmConfig, attention: str = "sdpa") -> Any:
    """Qwen2 where queries, keys and values have biases, else Llama. Frozen."""
    made, of = (Qwen2Config, Qwen2ForCausalLM) if cfg.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    return of(
        made(
            vocab_size=cfg.vocab,
            hidden_size=cfg.width,
            intermediate_size=cfg.feed_forward,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.kv_heads,
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            tie_word_embeddings=cfg.tie,
            use_cache=False,
            attn_implementation=attention,
        )
    ).requires_grad_(False)


def compressor_twin(config: CompressorConfig, widths: Widths) -> Any:
    """The module whose source an export would carry, freshly drawn."""
    facts = describe(config, widths)
    scope: dict[str, Any] = {}
    exec(compile(twin_source(facts), facts["family"], "exec"), scope)
    return scope["Compressor"](facts)


def tell(twin: Any, arrays: names.Arrays, config: CompressorConfig, widths: Widths) -> None:
    """The twin takes the weights of ours."""
    published = names.to_torch(arrays, config.names(widths))
    twin.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in published.items()})


def published(model: Any) -> dict[str, np.ndarray]:
    """Its tensors by the names they have on disk."""
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    if isinstance(model, CLIPVisionModel):
        tensors = {f"vision_model.{name.removeprefix('vision_model.')}": array for name, array in tensors.items()}
    return tensors


def take(module: nnx.Module, twin: Any, cfg: Any, dtype: str) -> tuple[Any, Any]:
    """graphdef and state of ours (which may be abstract) with the weights of a frozen twin on the CPU."""
    table, ignored = published_names(cfg)
    arrays = names.from_torch(published(twin), table, names.shapes(module), ignore=ignored)
    graphdef, state = nnx.split(module)
    for path, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(arrays.pop("/".join(map(str, path))), dtype))
    return graphdef, state


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, modules are drawn there and so: 13 GB never pass through the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
