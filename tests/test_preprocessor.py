"""A downloaded preprocessor_config.json becomes the Pixels that give the same image; what has no counterpart is refused."""

import pytest

from tcjax.config import Pixels
from tcjax.preprocessor import from_preprocessor, to_preprocessor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PUBLISHED = {
    # openai/clip-vit-large-patch14-336
    "clip": (
        {
            "crop_size": 336,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "resample": 3,
            "size": 336,
        },
        Pixels(size_YX=(336, 336), mean=CLIP_MEAN, std=CLIP_STD, geometry="crop"),
    ),
    # google/siglip-so400m-patch14-384
    "siglip": (
        {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "SiglipProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
        Pixels(size_YX=(384, 384)),
    ),
    # google/siglip2-so400m-patch14-384: bilinear
    "siglip2": (
        {"image_processor_type": "SiglipImageProcessorFast", "resample": 2, "size": {"height": 384, "width": 384}},
        Pixels(size_YX=(384, 384), resample="bilinear"),
    ),
    # google/siglip2-so400m-patch16-naflex
    "naflex": (
        {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16, "resample": 2},
        Pixels(size_YX=(256, 256), geometry="naflex", resample="bilinear", patch=16, max_patches=256),
    ),
    # facebook/dinov2-large
    "dinov2": (
        {
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "image_mean": list(IMAGENET_MEAN),
            "image_processor_type": "BitImageProcessor",
            "image_std": list(IMAGENET_STD),
            "resample": 3,
            "size": {"shortest_edge": 256},
        },
        Pixels(size_YX=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD, geometry="crop", shortest=256),
    ),
    "llava": (
        {
            "image_processor": {
                "image_processor_type": "LlavaImageProcessor",
                "do_pad": True,
                "size": {"shortest_edge": 336},
                "crop_size": {"height": 336, "width": 336},
            }
        },
        Pixels(size_YX=(336, 336), mean=CLIP_MEAN, std=CLIP_STD, geometry="pad"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_these_pixels(name):
    published, expected = PUBLISHED[name]
    assert from_preprocessor(published) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_is_read_again(name):
    _, pixels = PUBLISHED[name]
    assert from_preprocessor(to_preprocessor(pixels)) == pixels


def test_a_letterbox_cannot_be_written():
    with pytest.raises(ValueError, match="Prismatic's letterbox"):
        to_preprocessor(Pixels(size_YX=(8, 8), geometry="letterbox"))


REFUSED = {
    "another processor": ({"image_processor_type": "SamImageProcessor"}, "'SamImageProcessor' is not read"),
    "nothing": ({}, "'' is not read"),
    "another scale": ({"image_processor_type": "SiglipImageProcessor", "rescale_factor": 0.5}, "rescale_factor=0.5"),
    "no resize": ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "do_resize=false"),
    "no crop": ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "without a crop"),
    "nearest": ({"image_processor_type": "CLIPImageProcessor", "resample": 0}, "resample=0"),
    "longest": ({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 980}}, "longest_edge"),
    "two sizes": (
        {"image_processor_type": "BitImageProcessor", "size": {"height": 256, "width": 256}},
        "squashes to .* and then crops",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(name):
    published, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        from_preprocessor(published)


IMPOSSIBLE = {
    "unknown": (dict(geometry="stretch"), "'stretch' is unknown; possible: .*'crop'"),
    "nearest": (dict(resample="nearest"), "'nearest' is unknown"),
    "smaller than the crop": (dict(geometry="crop", shortest=7), "at least 8"),
    "shortest of a squash": (dict(shortest=9), "shortest=9"),
    "oblong crop": (dict(geometry="crop", size_YX=(8, 9)), "is no square"),
    "naflex without patches": (dict(geometry="naflex"), "naflex needs both"),
    "patches without naflex": (dict(patch=16), "take neither"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_pixels_that_contradict_themselves_are_refused(name):
    changes, said = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=said):
        Pixels(**{"size_YX": (8, 8), **changes})
