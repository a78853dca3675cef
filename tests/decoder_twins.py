"""Tiny decoders of every published family, the transformers class of each with random weights, and what it answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from tcjax.interop import names
from tcjax.llms import decoder, published
from tcjax.llms.decoder import Decoder, LlmConfig
from tcjax.llms.rope import LinearScaling, Llama3Scaling, YarnScaling

VOCAB = 29
LLAMA = LlmConfig(
    vocab=VOCAB,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,  # queries are 32 wide, the model 24
    feed_forward=32,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie=False,
)
# Waves of 6, 63, 628 and 6283 positions: the first is kept, the second blended, the others slow down.
LLAMA3 = dataclasses.replace(LLAMA, tie=True, rope_scaling=Llama3Scaling(factor=8.0, low=0.5, high=4.0, original=64))
MISTRAL = dataclasses.replace(LLAMA, window=4)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, norm_eps=1e-6, rope_theta=1e6, tie=True)
YARN = YarnScaling(factor=4.0, original=64, fast=8.0)  # the first pair is kept, the others blended or slow
CASES = {
    "llama": LLAMA,
    "llama-tied-ungrouped": dataclasses.replace(LLAMA, tie=True, kv_heads=4),
    "llama-biases": dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True),
    "llama-linear": dataclasses.replace(LLAMA, rope_scaling=LinearScaling(factor=2.5)),
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral-0.2": dataclasses.replace(LLAMA, rope_theta=1e6),
    "qwen2": QWEN2,
    "qwen2-yarn": dataclasses.replace(QWEN2, rope_theta=1e4, rope_scaling=YARN, head_width=6),
    "qwen3": QWEN3,
    "qwen3-window": dataclasses.replace(QWEN3, window=3, tie=False),
}
KINDS = {"mistral-0.2": "mistral"}  # where the config alone could be another class, too
LENGTHS = np.array([9, 5, 1])  # valid tokens per row


class Twin(NamedTuple):
    """cfg: ours. model: theirs. folder: as theirs is saved. tensors: its file. llm: ours with those weights."""

    cfg: LlmConfig
    model: torch.nn.Module
    folder: Path
    tensors: dict[str, np.ndarray]
    llm: Decoder


def twin(case: str, folder: Path) -> Twin:
    """The published class at this size, saved and read back; every tensor random, so that none hides behind a 0 or 1."""
    cfg = CASES[case]
    fields = published.to_json(cfg) | {"max_position_embeddings": 64}
    if case in KINDS:
        fields |= {"model_type": KINDS[case], "sliding_window": None}
    nobody = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = transformers.AutoConfig.for_model(**fields, **nobody)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    return Twin(cfg, model, folder, tensors, loaded(cfg, tensors))


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))


def loaded(cfg: LlmConfig, tensors: dict[str, np.ndarray]) -> Decoder:
    llm = cfg.build(nnx.Rngs(0))
    names.assign(llm, names.from_torch(tensors, decoder.names(cfg), names.shapes(llm), ignore=decoder.ignore(cfg)))
    return llm


def prompt(side: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BS and valid_BS of LENGTHS valid tokens, the same tokens whichever side is padded; "none" pads nothing."""
    rng, S = np.random.default_rng(0), LENGTHS.max()
    tokens_BS = rng.integers(0, VOCAB, (len(LENGTHS), S))
    valid_BS = np.arange(S) < LENGTHS[:, None]
    if side == "none":
        return tokens_BS, np.ones_like(valid_BS)
    if side == "right":
        return tokens_BS, valid_BS
    rolled = [np.roll(row, S - length) for row, length in zip(tokens_BS, LENGTHS, strict=True)]
    return np.stack(rolled), valid_BS[:, ::-1]


def theirs(model: torch.nn.Module, tokens_BS: np.ndarray, valid_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """hidden_BSD after the last norm, and logits_BSV."""
    mask = torch.from_numpy(valid_BS.copy())
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens_BS.copy()),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            output_hidden_states=True,
        )
    return out.hidden_states[-1].numpy(), out.logits.numpy()
