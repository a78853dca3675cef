"""The frozen tower's tokens, computed once and shared by every run that sees the same images through the same tower.

    folder/<key>/tokens.npy     float32 [images, N, C], memory-mapped; a row of NaN where the image could not be read
    folder/<key>/progress.json  how many rows are whole; a build that was killed goes on from there

The key is a hash of the tower's config and weights, the layer, the preprocessing and the dataset's content, so another
tower, layer, size, normalisation or split is another folder. A hit equals the tower run inline, bit for bit on one backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tcjax.record import write_json
from tcjax.sharding import spread

BATCH = 64


def feature_key(facts: dict[str, Any]) -> str:
    """16 hex digits of what the features depend on: tower identity, its config and the dataset's fingerprint."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cached_features(
    tower: nnx.Module,
    read: Callable[[int], np.ndarray | None],
    num: int,
    *,
    folder: Path,
    facts: dict[str, Any],
    show: Callable[[int, int], None] = lambda done, num: None,
) -> np.ndarray:
    """The tokens of images 0 ... num - 1, computed where they are not on disk yet.

    Args:
        tower: images_BYX3 -> tokens_BNC.
        read: normalised image_YX3 of one index, None if it cannot be read.
        folder: where caches live; each key has its own subfolder.
        facts: everything the result depends on, JSON types; stored beside the tokens.
        show: called with (rows done, num) after every batch.

    Returns:
        A read-only memory map, float32 [num, N, C].
    """
    place = folder / feature_key(facts)
    path, progress = place / "tokens.npy", place / "progress.json"
    done = json.loads(progress.read_text())["rows"] if progress.exists() and path.exists() else 0
    if done < num:
        graphdef, state = nnx.split(tower)
        rows, whole = spread(state, BATCH)
        run = jax.jit(lambda state, images_BYX3: nnx.merge(graphdef, state)(images_BYX3), out_shardings=whole)
        blank = next((image for image in map(read, range(num)) if image is not None), None)
        if blank is None:
            raise ValueError(f"none of the {num} images can be read; run `tcjax data verify`.")
        shape = jax.eval_shape(run, state, jax.ShapeDtypeStruct((1, *blank.shape), np.float32)).shape
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "facts.json", facts)
        mode = "r+" if done else "w+"
        tokens = np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=(num, *shape[1:]))
        for start in range(done, num, BATCH):
            images = [read(i) for i in range(start, min(start + BATCH, num))]
            filled = [blank if image is None else image for image in images] + [blank] * (BATCH - len(images))
            found = np.array(run(state, jax.device_put(np.stack(filled), rows)))[: len(images)]
            found[[image is None for image in images]] = np.nan
            tokens[start : start + len(images)] = found
            tokens.flush()
            write_json(progress, {"rows": start + len(images)})
            show(start + len(images), num)
    return np.load(path, mmap_mode="r")
