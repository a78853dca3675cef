"""Tiny random towers of every published family as transformers saves them, and ours read from those folders."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from tcjax import assemble
from tcjax.config import Pixels
from tcjax.interop import names, tensors
from tcjax.towers.vit import Vit, VitConfig

CLIP = VitConfig(
    pixels=Pixels(size_YX=(16, 16)),
    patch=4,
    width=24,
    layers=3,
    heads=3,
    feed_forward=48,
    activation="quick_gelu",
    norm_eps=1e-5,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    post_norm=False,
)
SIGLIP = dataclasses.replace(
    CLIP,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    post_norm=True,
)
NAFLEX = dataclasses.replace(
    SIGLIP,
    pixels=Pixels(size_YX=(16, 16), geometry="naflex", patch=4, max_patches=24),
    table_HW=(4, 4),
    resize="bilinear antialiased",
)
DINOV2 = dataclasses.replace(
    SIGLIP, activation="gelu", class_token=True, post_norm=True, layer_scale=True, names="dinov2"
)
REGISTERS = dataclasses.replace(DINOV2, registers=2, resize="bicubic antialiased")
TOWERS = {"clip": CLIP, "siglip": SIGLIP, "naflex": NAFLEX, "dinov2": DINOV2, "registers": REGISTERS}


def twin(cfg: VitConfig, *, eager: bool = False) -> torch.nn.Module:
    """The published vision class at this size; every tensor random, so that nothing hides behind an initial 0 or 1."""
    fields = dict(
        image_size=cfg.position_HW[0] * cfg.patch,
        patch_size=cfg.patch,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        hidden_act=cfg.activation,
        layer_norm_eps=cfg.norm_eps,
    )
    of_mlp = {"intermediate_size": cfg.feed_forward}
    if cfg.names == "dinov2":
        of_mlp = {"mlp_ratio": cfg.feed_forward // cfg.width}
    if cfg.ragged:
        of_mlp["num_patches"] = cfg.position_HW[0] ** 2
        del fields["image_size"]
    if cfg.registers:
        of_mlp["num_register_tokens"] = cfg.registers
    family = {"clip": "CLIPVision", "siglip": "SiglipVision", "naflex": "Siglip2Vision", "dinov2": "Dinov2"}
    name = family.get(kind(cfg), "Dinov2WithRegisters")
    config = getattr(transformers, f"{name}Config")(**fields, **of_mlp)
    config._attn_implementation = "eager" if eager else "sdpa"
    return randomised(getattr(transformers, f"{name}Model")(config))


def kind(cfg: VitConfig) -> str:
    """The family's name in TOWERS."""
    if cfg.names == "dinov2":
        return "registers" if cfg.registers else "dinov2"
    return "naflex" if cfg.ragged else "clip" if cfg.class_token else "siglip"


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model.eval()


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def loaded(cfg: VitConfig, folder: Path) -> Vit:
    """Read from disk by its NAMES table, wherever in the checkpoint the tower lies."""
    arrays = tensors.load(folder)
    tower = nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))
    table, ignored = assemble.published_names(cfg)
    arrays = {ours: arrays[there] for ours, there in assemble.places(cfg, arrays).items()}
    graphdef, state = nnx.split(tower)
    leaves = names.from_torch(arrays, table, names.shapes(tower), ignore=ignored)
    flat = [
        (path, leaf.replace(jnp.asarray(leaves["/".join(map(str, path))], jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def images(cfg: VitConfig, batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, *cfg.pixels.shape)).astype(np.float32)


def pixels(images_BYX3: np.ndarray) -> torch.Tensor:
    """As the published classes read them."""
    return torch.from_numpy(images_BYX3).permute(0, 3, 1, 2)
