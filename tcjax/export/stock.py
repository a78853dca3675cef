"""A stock class of transformers, described: what it asks of a model, and where in it the model's tensors go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tcjax.export import hosts
from tcjax.interop import names
from tcjax.towers.vit import VitConfig
from tcjax.vlm import VlmConfig


class Host(NamedTuple):
    """why_not(facts, config): "" if it computes this compressor in this model. config: outer fields.

    key: published name of a compressor's tensor -> its name in the class. tower, llm: prefixes for vision_model.* and
    for model.* ("lm_head.weight" goes to `head`). towers: the architectures it can have.
    vision: `vision_config`. tower_tensors: those of `hosts.tower_tensors` under the class's own names.
    derived: all tensors -> the same with what the class keeps in another form.
    about, prepare: for the README, and a line of code there between processor and generate.
    """

    name: str
    model_type: str
    after_norm: bool
    why_not: Callable[[dict, VlmConfig], str]
    config: Callable[[dict, VlmConfig], dict[str, Any]]
    key: Callable[[str], str]
    tower: str
    llm: str
    head: str
    image_token: str = "image_token_id"
    towers: tuple[str, ...] = ("CLIP", "SigLIP")
    vision: Callable[[VitConfig], dict[str, Any]] = hosts.tower_config
    tower_tensors: Callable[[names.Arrays, VitConfig], names.Arrays] = lambda found, tower: found
    derived: Callable[[names.Arrays], names.Arrays] = lambda weights: weights
    about: str = ""
    prepare: str = ""


def why_not_all_queries(facts: dict, called: str) -> str:
    """Why a class that uses every query it has weights for does not fit; "" if it does."""
    if facts["num_queries"] == facts["max_queries"]:
        return ""
    return f"it uses all of its {facts['max_queries']} {called}, this run {facts['num_queries']} of them"
