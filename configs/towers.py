"""Published vision towers by their checkpoints' own numbers; `weights` is the path of their safetensors, or of their folder.

A folder with its config.json and preprocessor_config.json says the same by itself: tcjax.towers.published.tower(folder).
"""

from __future__ import annotations

from dataclasses import replace

from tcjax.config import Pixels
from tcjax.towers.dual import DualConfig
from tcjax.towers.vit import VitConfig

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip_b_16(weights: str = "", feature_layer: int = -2, geometry: str = "crop") -> VitConfig:
    """openai/clip-vit-base-patch16: 14 x 14 = 196 tokens of width 768; 85,799,424 parameters."""
    base = _clip(224, weights, feature_layer, geometry)
    return replace(base, patch=16, width=768, layers=12, heads=12, feed_forward=3072)


def clip_l_224(weights: str = "", feature_layer: int = -2, geometry: str = "crop") -> VitConfig:
    """openai/clip-vit-large-patch14: 16 x 16 = 256 tokens of width 1024; 303,179,776 parameters."""
    return _clip(224, weights, feature_layer, geometry)


def clip_l_336(weights: str = "", feature_layer: int = -2, geometry: str = "crop") -> VitConfig:
    """openai/clip-vit-large-patch14-336: 24 x 24 = 576 tokens of width 1024, read where LLaVA-1.5 reads them.

    303,507,456 parameters. geometry: LLaVA-1.5 pretrains with the published "crop" and finetunes with "pad".
    """
    return _clip(336, weights, feature_layer, geometry)


def siglip_b_224(weights: str = "", feature_layer: int = -1) -> VitConfig:
    """google/siglip-base-patch16-224: 14 x 14 = 196 tokens of width 768; 92,884,224 parameters with the pooling head."""
    return _siglip_b(224, weights, feature_layer)


def siglip_so400m_224(weights: str = "", feature_layer: int = -1) -> VitConfig:
    """google/siglip-so400m-patch14-224: 16 x 16 = 256 tokens of width 1152."""
    return _so400m(224, 14, weights, feature_layer)


def siglip_so400m_384(weights: str = "", feature_layer: int = -1) -> VitConfig:
    """google/siglip-so400m-patch14-384: 27 x 27 = 729 tokens of width 1152; the last 6 pixels are left out.

    428,225,600 parameters with the pooling head.
    """
    return _so400m(384, 14, weights, feature_layer)


def siglip2_b_256(weights: str = "", feature_layer: int = -1) -> VitConfig:
    """google/siglip2-base-patch16-256: 16 x 16 = 256 tokens of width 768; SigLIP's class, resized bilinearly."""
    return _bilinear(_siglip_b(256, weights, feature_layer))


def siglip2_so400m_384(weights: str = "", feature_layer: int = -1) -> VitConfig:
    """google/siglip2-so400m-patch14-384: 27 x 27 = 729 tokens of width 1152."""
    return _bilinear(_so400m(384, 14, weights, feature_layer))


def siglip2_so400m_512(weights: str = "", feature_layer: int = -1) -> VitConfig:
    """google/siglip2-so400m-patch16-512: 32 x 32 = 1024 tokens of width 1152."""
    return _bilinear(_so400m(512, 16, weights, feature_layer))


def siglip2_so400m_naflex(weights: str = "", feature_layer: int = -1, max_patches: int = 256) -> VitConfig:
    """google/siglip2-so400m-patch16-naflex: up to `max_patches` tokens of width 1152 of an image of any shape.

    427,888,064 parameters with the pooling head.
    """
    pixels = Pixels(size_YX=(256, 256), geometry="naflex", patch=16, max_patches=max_patches, resample="bilinear")
    fixed = _so400m(256, 16, weights, feature_layer)
    return replace(fixed, pixels=pixels, table_HW=(16, 16), resize="bilinear antialiased")


def dinov2_b(weights: str = "", feature_layer: int = -1, size: int = 224) -> VitConfig:
    """facebook/dinov2-base: patches of 14, at the published 224 pixels 16 x 16 = 256 tokens of width 768.

    Its position table is that of 518 pixels, 37 x 37, and is resized. 86,580,480 parameters with the mask token.
    """
    base = _dinov2(weights, feature_layer, size)
    return replace(base, width=768, layers=12, heads=12, feed_forward=3072)


def dinov2_l(weights: str = "", feature_layer: int = -1, size: int = 224) -> VitConfig:
    """facebook/dinov2-large: width 1024; 304,368,640 parameters with the mask token."""
    return _dinov2(weights, feature_layer, size)


def dinov2_b_registers(weights: str = "", feature_layer: int = -1, size: int = 224) -> VitConfig:
    """facebook/dinov2-with-registers-base: four registers more, and a table that is resized with antialiasing."""
    return replace(dinov2_b(weights, feature_layer, size), registers=4, resize="bicubic antialiased")


def dinov2_l_registers(weights: str = "", feature_layer: int = -1, size: int = 224) -> VitConfig:
    """facebook/dinov2-with-registers-large."""
    return replace(dinov2_l(weights, feature_layer, size), registers=4, resize="bicubic antialiased")


def dinosiglip_384(dinov2_weights: str = "", siglip_weights: str = "") -> DualConfig:
    """Prismatic's dinosiglip-vit-so-384px: DINOv2-L with registers, then SigLIP so400m, 27 x 27 = 729 tokens of width 2176."""
    return _dinosiglip(384, dinov2_weights, siglip_so400m_384(siglip_weights, feature_layer=-2))


def dinosiglip_224(dinov2_weights: str = "", siglip_weights: str = "") -> DualConfig:
    """Prismatic's dinosiglip-vit-so-224px: 16 x 16 = 256 tokens of width 2176."""
    return _dinosiglip(224, dinov2_weights, siglip_so400m_224(siglip_weights, feature_layer=-2))


def _clip(size: int, weights: str, feature_layer: int, geometry: str) -> VitConfig:
    return VitConfig(
        pixels=Pixels(size_YX=(size, size), mean=_CLIP_MEAN, std=_CLIP_STD, geometry=geometry),
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


def _so400m(size: int, patch: int, weights: str, feature_layer: int) -> VitConfig:
    return VitConfig(
        pixels=Pixels(size_YX=(size, size)),
        patch=patch,
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


def _siglip_b(size: int, weights: str, feature_layer: int) -> VitConfig:
    base = _so400m(size, 16, weights, feature_layer)
    return replace(base, width=768, layers=12, heads=12, feed_forward=3072)


def _bilinear(tower: VitConfig) -> VitConfig:
    """SigLIP2's images are resized bilinearly."""
    return replace(tower, pixels=replace(tower.pixels, resample="bilinear"))


def _dinov2(weights: str, feature_layer: int, size: int) -> VitConfig:
    return VitConfig(
        pixels=Pixels(
            size_YX=(size, size),
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            geometry="crop",
            shortest=size * 256 // 224,
        ),
        patch=14,
        width=1024,
        layers=24,
        heads=16,
        feed_forward=4096,
        activation="gelu",
        norm_eps=1e-6,
        class_token=True,
        patch_bias=True,
        pre_norm=False,
        post_norm=True,
        layer_scale=True,
        names="dinov2",
        table_HW=(37, 37),
        feature_layer=feature_layer,
        weights=weights,
    )


def _dinosiglip(size: int, weights: str, siglip: VitConfig) -> DualConfig:
    """Resized naively, both behind the second-to-last block."""
    pixels = Pixels(size_YX=(size, size), mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
    return DualConfig(towers=(replace(dinov2_l_registers(weights, feature_layer=-2, size=size), pixels=pixels), siglip))
