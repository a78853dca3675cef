"""A published preprocessor_config.json -> `Pixels`: what a downloaded tower wants its images to be.

Read are the files of CLIPImageProcessor, SiglipImageProcessor, Siglip2ImageProcessor, BitImageProcessor (DINOv2),
ViTImageProcessor and LlavaImageProcessor, old spellings (`feature_extractor_type`, sizes as one number) included. Every key
that changes pixels is either honoured or refused.
"""

from __future__ import annotations

import math
from typing import Any

from tcjax.config import Pixels

_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CROP = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of the classes, for keys a file leaves out
    "CLIP": _CLIP | _CROP,
    "Llava": _CLIP | _CROP | {"do_pad": False},
    "Bit": _CLIP | _CROP,
    "Siglip": _HALF | {"size": 224, "resample": 3},
    "ViT": _HALF | {"size": 224, "resample": 2},
    "Siglip2": _HALF | {"resample": 2, "patch_size": 16, "max_num_patches": 256},
}
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def from_preprocessor(published: dict[str, Any]) -> Pixels:
    """The `Pixels` that give what the named processor gives.

    Args:
        published: preprocessor_config.json, or a processor_config.json that holds one as `image_processor`.

    Raises:
        ValueError: a processor or a setting that has no counterpart here, by its name.
    """
    published = published.get("image_processor", published)
    name = str(published.get("image_processor_type") or published.get("feature_extractor_type") or "")
    family = (
        name.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    )
    if family not in _DEFAULTS:
        known = [f"{family}ImageProcessor" for family in _DEFAULTS]
        raise ValueError(f"image_processor_type={name!r} is not read; known are {known}. Write its Pixels by hand.")
    given = _DEFAULTS[family] | {key: value for key, value in published.items() if value is not None}
    for key in ("do_resize", "do_rescale"):
        if not given.get(key, True):
            raise ValueError(f"{name} with {key}=false leaves images as they are; write the tower's Pixels by hand.")
    if not math.isclose(given.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{name} with rescale_factor={given['rescale_factor']}: values are divided by 255 here.")
    if given["resample"] not in _RESAMPLE:
        raise ValueError(f"{name} with resample={given['resample']}: known are {_RESAMPLE}.")
    normalised = given.get("do_normalize", True)
    same: dict[str, Any] = {
        "mean": tuple(given["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        "std": tuple(given["image_std"]) if normalised else (1.0, 1.0, 1.0),
        "resample": _RESAMPLE[given["resample"]],
    }
    if family == "Siglip2":
        patch, patches = given["patch_size"], given["max_num_patches"]
        side = math.isqrt(patches) * patch
        return Pixels(size_YX=(side, side), geometry="naflex", patch=patch, max_patches=patches, **same)
    return Pixels(**_sizes(name, family, given), **same)


def to_preprocessor(pixels: Pixels) -> dict[str, Any]:
    """preprocessor_config.json of the class that gives these pixels; the inverse of `from_preprocessor`.

    Raises:
        ValueError: a letterbox, which no class of transformers has.
    """
    if pixels.geometry == "letterbox":
        raise ValueError(
            "no processor of transformers makes Prismatic's letterbox; train with geometry='pad' to export."
        )
    common = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": {name: number for number, name in _RESAMPLE.items()}[pixels.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    if pixels.geometry == "naflex":
        sizes = {"patch_size": pixels.patch, "max_num_patches": pixels.max_patches}
        return {"image_processor_type": "Siglip2ImageProcessor", **common, **sizes}
    Y, X = pixels.size_YX
    squash = pixels.geometry == "squash"
    padded = {"do_pad": True} if pixels.geometry == "pad" else {}
    return {
        "image_processor_type": "LlavaImageProcessor" if padded else "CLIPImageProcessor",
        **common,
        **padded,
        "size": {"height": Y, "width": X} if squash else {"shortest_edge": pixels.shortest or min(Y, X)},
        "do_center_crop": not squash,
        "crop_size": {"height": Y, "width": X},
    }


def _sizes(name: str, family: str, given: dict[str, Any]) -> dict[str, Any]:
    """size_YX, geometry, shortest."""
    size = given["size"]
    if isinstance(size, int):
        size = {"height": size, "width": size} if family in ("Siglip", "ViT") else {"shortest_edge": size}
    crop = given.get("crop_size") if given.get("do_center_crop") else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    crop_YX = None if crop is None else (crop["height"], crop["width"])
    if set(size) == {"height", "width"}:
        size_YX = (size["height"], size["width"])
        if given.get("do_pad") or crop_YX not in (None, size_YX):
            raise ValueError(
                f"{name} squashes to {size} and then crops to {crop} or pads; that has no counterpart here."
            )
        return {"size_YX": size_YX, "geometry": "squash"}
    if set(size) != {"shortest_edge"}:
        raise ValueError(f"{name} with size={size}: known are shortest_edge alone, or height and width.")
    shortest, padded = size["shortest_edge"], bool(given.get("do_pad"))
    if crop_YX is None and not padded:
        raise ValueError(
            f"{name} resizes the shorter side to {shortest} without a crop: images of one size are needed."
        )
    size_YX = crop_YX or (shortest, shortest)
    return {
        "size_YX": size_YX,
        "geometry": "pad" if padded else "crop",
        "shortest": 0 if size_YX == (shortest, shortest) else shortest,
    }
