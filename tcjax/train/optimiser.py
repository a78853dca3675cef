"""AdamW with linear warm-up, cosine decay and a global-norm clip; weight decay touches matrices only.

A matrix is a parameter with two letters besides L (layers), so a stack of biases is none, and neither are queries
(letters beginning with Q: learned tokens are not a map between widths).
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from tcjax.config import TrainConfig
from tcjax.train.state import part_of


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: 0 -> peak over `warmup * steps`, cosine to end_lr at `steps`."""
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.peak_lr, config.peak_lr, warmup, max(config.steps, warmup + 1), config.end_lr
    )


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """ValueError if `lr_of` names a part that does not learn, or gives it no positive rate."""
    wrong = {part: peak for part, peak in config.lr_of.items() if part not in config.trainable or peak <= 0}
    if wrong:
        raise ValueError(f"lr_of gives {wrong}; it takes positive peaks of parts that learn, {list(config.trainable)}.")
    adamw = optax.adamw(
        schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_matrices,
    )
    optimiser = optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw
    if not config.lr_of:
        return optimiser
    return optax.chain(optimiser, _by_part({part: peak / config.peak_lr for part, peak in config.lr_of.items()}))


def _by_part(factors: dict[str, float]) -> optax.GradientTransformation:
    """Updates, decay included, times the factor of their part: the same as another peak in the schedule."""

    def scale(updates: Any, _: Any = None) -> Any:
        scaled = [
            (path, leaf.replace(factors.get(part_of(path), 1.0) * leaf.get_value()))
            for path, leaf in nnx.to_flat_state(updates)
        ]
        return nnx.from_flat_state(scaled)

    return optax.stateless(scale)


def _matrices(params: Any) -> Any:
    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes").removeprefix("L")
        return variable.replace(len(axes) >= 2 and not axes.startswith("Q"))

    return jax.tree.map(is_matrix, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
