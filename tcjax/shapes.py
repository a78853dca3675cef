"""The arrays of a run as shapes and types alone: its model in parts, its state, its batch, and what they weigh on a mesh.

What `tcjax train --dry-run` counts and `tcjax plan` compiles is built here as the trainer builds it, without a weight.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from tcjax.assemble import abstract
from tcjax.batch import Batch
from tcjax.config import Run
from tcjax.evaluate.cost import training_flops
from tcjax.sharding import spec
from tcjax.train.state import recompute, split
from tcjax.vlm import VlmConfig


def parts(run: Run) -> tuple[Any, Any, Any]:
    """graphdef, trainable, frozen, as `tcjax.job` hands them to the loop."""
    how = run.train
    model = abstract(run.model, trainable=how.trainable, frozen=how.frozen, lora=how.lora)
    recompute(model, how.remat, packed=run.data.batching == "packed")
    return split(model, how.trainable)


def abstract_batch(run: Run, rows: int) -> Batch:
    """A batch of `rows` rows; the tower's tokens instead of pixels where they are cached."""
    config: Any = run.model
    images = rows * run.data.images
    S = run.data.images * config.num_queries + run.data.text_length

    def array(dtype: Any, *shape: int, lead: int = rows) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((lead, *shape), dtype)

    if run.train.feature_cache:
        widths = config.widths
        seen = {
            "features_BNC": array(
                jnp.dtype(run.train.feature_cache),
                widths.num_tokens,
                (1 + widths.levels) * widths.vision_C,
                lead=images,
            )
        }
    else:
        seen = {"images_BYX3": array(jnp.uint8, *config.tower.pixels.shape, lead=images)}
    if config.tower.pixels.geometry == "naflex":
        seen["grids_B2"] = array(jnp.int32, 2, lead=images)
    return Batch(
        tokens_BS=array(jnp.int32, S),
        is_image_BS=array(jnp.bool_, S),
        supervised_BS=array(jnp.bool_, S),
        valid_BS=array(jnp.bool_, S),
        segment_BS=array(jnp.int32, S) if run.data.independent_turns or run.data.batching == "packed" else None,
        instruction_BT=array(jnp.int32, run.data.instruction_length, lead=images) if config.reads_text else None,
        index_B=array(jnp.int32, lead=images),
        **seen,
    )


def useful_flops(run: Run) -> int | None:
    """Of one step, every position filled and supervised; None where no formula is known."""
    if not isinstance(run.model, VlmConfig):
        return None
    how, cached = run.train, bool(run.train.feature_cache)
    each = training_flops(run.model, run.data.text_length, how.trainable, lora=how.lora, cached_features=cached)
    return run.data.batch * each


def held(state: Any, mesh: Mesh | AbstractMesh) -> int:
    """Bytes on one device, sharded as `place` does it."""
    total = 0
    for _, leaf in nnx.to_flat_state(state):
        for value in jax.tree.leaves(leaf.get_value()):  # codes and scale of a quantised one
            total += math.prod(value.shape) * value.dtype.itemsize // ways(leaf, value, mesh)
    return total


def ways(leaf: Any, value: Any, mesh: Mesh | AbstractMesh) -> int:
    """Among how many devices `place` splits it."""
    entries = [entry for entry in spec(leaf.get_metadata("axes"), value.shape, mesh) if entry]
    return math.prod(mesh.shape[name] for entry in entries for name in _names(entry))


def _names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry
