"""Published vision towers by their checkpoints' own numbers; `weights` is the path of their safetensors."""

from __future__ import annotations

from tcjax.config import Pixels
from tcjax.towers.vit import VitConfig

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_l_336(weights: str = "", feature_layer: int = -2) -> VitConfig:
    """openai/clip-vit-large-patch14-336: 24 x 24 = 576 tokens of width 1024, read where LLaVA-1.5 reads them."""
    return VitConfig(
        pixels=Pixels(size_YX=(336, 336), mean=_CLIP_MEAN, std=_CLIP_STD),
        patch=14,
        width=1024,
        layers=24,
        heads=16,
        feed_forward=4096,
        activation="quick_gelu",
        norm_eps=1e-5,
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        post_norm=False,
        feature_layer=feature_layer,
        weights=weights,
    )


def siglip_so400m_384(weights: str = "", feature_layer: int = -1) -> VitConfig:
    """google/siglip-so400m-patch14-384: 27 x 27 = 729 tokens of width 1152; the last 6 pixels are left out."""
    return VitConfig(
        pixels=Pixels(size_YX=(384, 384)),
        patch=14,
        width=1152,
        layers=27,
        heads=16,
        feed_forward=4304,
        activation="gelu_pytorch_tanh",
        norm_eps=1e-6,
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        post_norm=True,
        feature_layer=feature_layer,
        weights=weights,
    )
