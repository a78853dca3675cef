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


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: 0 -> peak over `warmup * steps`, cosine to end_lr at `steps`."""
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.peak_lr, config.peak_lr, warmup, max(config.steps, warmup + 1), config.end_lr
    )


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    adamw = optax.adamw(schedule(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def _matrices(params: Any) -> Any:
    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes").removeprefix("L")
        return variable.replace(len(axes) >= 2 and not axes.startswith("Q"))

    return jax.tree.map(is_matrix, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
