"""Frozen means structurally frozen: the model is split into what learns and what does not, before anything is made of it.

Only the trainable side is differentiated, given moments, decayed, donated and saved. The frozen side is an argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tcjax.nn.layers import REMATS
from tcjax.nn.lora import PART, is_lora
from tcjax.nn.quantised import is_quantised

COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class State(NamedTuple):
    """What a step changes: trainable parameters (float32) and the optimiser's state."""

    trainable: Any
    optimiser: Any


def split(model: nnx.Module, parts: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """graphdef, trainable, frozen. ValueError if a part is not one of the model's, or if its LoRA would not learn."""
    names = sorted({part_of(path) for path, _ in nnx.to_flat_state(nnx.state(model))})
    unknown = [part for part in parts if part not in names]
    if unknown or not parts:
        raise ValueError(
            f"trainable={parts!r} must name parts of {type(model).__name__}, which are {names} (train.lora.rank adds {PART!r})."
        )
    if PART in names and PART not in parts:
        raise ValueError(
            f"train.lora adds updates that trainable={parts!r} would freeze at 0; name {PART!r} there, too."
        )
    graphdef, trainable, frozen = nnx.split(model, lambda path, _: part_of(path) in parts, ...)
    return graphdef, trainable, frozen


def part_of(path: tuple[Any, ...]) -> str:
    """The part of the model that a leaf belongs to: "lora" wherever that is attached, else the path's first name."""
    return PART if is_lora(path) else str(path[0])


def init(trainable: Any, optimiser: optax.GradientTransformation) -> State:
    return State(trainable, optimiser.init(trainable))


def cast(tree: Any, dtype: Any) -> Any:
    """Floating leaves in `dtype`, the rest as it is, quantised weights with their scales too."""

    def one(x: Any) -> Any:
        return x if is_quantised(x) or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

    return jax.tree.map(one, tree, is_leaf=is_quantised)


def compute_dtype(name: str) -> Any:
    if name not in COMPUTE:
        raise ValueError(f"compute={name!r} is not one of {sorted(COMPUTE)}.")
    return COMPUTE[name]


def recompute(model: Any, remat: str, *, packed: bool = False) -> None:
    """In place: what of the LLM's blocks is kept for the backward pass. ValueError for an unknown policy or no LLM.

    packed: the rows to come hold whole samples, so that no segment 0 is shared, and attention may rely on it.
    """
    if remat not in REMATS:
        raise ValueError(f"train.remat={remat!r} is not one of {list(REMATS)}.")
    if remat != "none" and not hasattr(model, "llm"):
        raise ValueError(f"train.remat={remat!r} is about an LLM, and {type(model).__name__} has none.")
    if hasattr(model, "llm"):
        model.llm.remat, model.llm.packed = remat, packed


def num_parameters(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_quantised))
