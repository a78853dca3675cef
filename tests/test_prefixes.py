"""A part's tensors are found in a checkpoint of a larger model by their names alone, and strangers are refused."""

import pytest

from tcjax.interop.prefixes import Layout, places, recognise

ALONE = Layout("LLM", {"": ""}, others=("model.mm_projector.",))
LLAVA = Layout(
    "LLaVA",
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    others=("vision_tower.", "mmp."),
)
SIGN = "model.embed.weight"
INSIDE = [
    "language_model.model.embed.weight",
    "language_model.model.layers.0.w",
    "language_model.lm_head.weight",
    "vision_tower.conv.weight",
    "mmp.0.weight",
]


def test_names_alone_stay_and_another_part_is_left_out():
    found = ["model.embed.weight", "lm_head.weight", "model.mm_projector.0.weight"]
    kept = {name: name for name in found[:2]}
    assert places(found, [ALONE, LLAVA], SIGN, "an LLM") == kept


def test_names_inside_a_larger_model_lose_its_prefix():
    assert recognise(INSIDE, [ALONE, LLAVA], SIGN, "an LLM") is LLAVA
    assert places(INSIDE, [ALONE, LLAVA], SIGN, "an LLM") == {
        "model.embed.weight": "language_model.model.embed.weight",
        "model.layers.0.w": "language_model.model.layers.0.w",
        "lm_head.weight": "language_model.lm_head.weight",
    }


def test_what_has_no_place_in_the_layout_is_refused():
    with pytest.raises(
        ValueError, match=r"model.norm.weight is no tensor of a LLaVA checkpoint: .*language_model.model."
    ):
        places([*INSIDE, "model.norm.weight"], [ALONE, LLAVA], SIGN, "an LLM")


def test_another_architecture_says_what_it_has_instead():
    found = [f"encoder.block.{n}.weight" for n in range(12)] + ["shared.weight"]
    with pytest.raises(ValueError) as error:  # noqa: PT011  three claims about one message
        recognise(found, [ALONE, LLAVA], SIGN, "an LLM in checkpoints/t5")
    for part in (
        "an LLM in checkpoints/t5 is not there",
        "LLaVA: language_model.model.embed.weight",
        "13 tensors are:\n  encoder.block.{0..11}.weight\n  shared.weight",
    ):
        assert part in str(error.value)


def test_two_at_once_are_refused():
    with pytest.raises(ValueError, match=r"there 2 times, as \['LLM', 'LLaVA'\]; keep one"):
        recognise([*INSIDE, "model.embed.weight"], [ALONE, LLAVA], SIGN, "an LLM")
