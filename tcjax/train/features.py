"""The frozen tower's tokens, computed once and shared by every run that sees the same images through the same tower.

    hit = round(tower(images), dtype)        the tower in the type of its own weights, as it runs inline

In "float32" a hit is the tower run inline, bit for bit on one backend; in "bfloat16" it is that rounded once, which halves
the disk (576 x 1024 tokens: 1.18 MB per image, 658 GB for LLaVA's 558k). The key is a hash of the tower's config and
weights, the layer, the preprocessing, the stored type and the dataset's content. tcjax/train/feature_store.py is the format.

Shard s belongs to process s modulo their number; whole shards stay after a kill, and any number of processes may go on:
what a shard holds depends on its own records alone, so the finished files are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tcjax.config import Pixels
from tcjax.sharding import own
from tcjax.train.feature_store import DTYPES, Features, Layout, save_layout, write_shard

BATCH = 64  # images per device and pass; fixed, so that a token does not depend on how many devices there are

# Of one image: its uint8 pixels, and rows and columns of its own patches where it has a grid of its own.
Seen = tuple[np.ndarray, np.ndarray | None]


def feature_key(facts: dict[str, Any]) -> str:
    """16 hex digits of what the features depend on: tower identity, its config and the dataset's fingerprint."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cached_features(
    tower: nnx.Module,
    pixels: Pixels,
    read: Callable[[int], list[Seen | None]],
    num: int,
    *,
    folder: Path,
    facts: dict[str, Any],
    dtype: str = "float32",
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 0,
    wait: Callable[[], None] = lambda: None,
    show: Callable[[int, int], None] = lambda done, num: None,
) -> Features:
    """The tokens of all images of records 0 ... num - 1, computed where they are not on disk yet.

    Args:
        tower: (images_BYX3, grids_B2) -> tokens_BNC; grids only where `pixels.geometry` is "naflex".
        read: a record's images in order, None for one that cannot be read; safe to call from several threads.
        folder: where caches live; each key has its own subfolder.
        facts: everything the result depends on but `dtype`, JSON types; stored beside the tokens.
        dtype: "float32" or "bfloat16", as it is stored.
        threads: that read images while the tower computes; 0 reads in the caller's.
        wait: called when this process has done its share; returns when all have.
        show: called with (records done, records of this process's share) after every shard.

    Raises:
        ValueError: the disk lacks the space, no image can be read, or another process left its share undone.
    """
    if dtype not in DTYPES:
        raise ValueError(f"feature_cache={dtype!r} is unknown; possible: '' (none) and {sorted(DTYPES)}.")
    facts = facts | {"dtype": dtype}
    place = folder / feature_key(facts)
    see = _Tower(tower, pixels, dtype)
    layout = Layout(shape=see.shape, dtype=dtype, grids=pixels.geometry == "naflex", records=num)
    missing = [shard for shard in range(layout.num_shards) if not layout.path(place, shard).is_file()]
    share = [shard for shard in missing if shard % process_count == process_index]
    if missing:
        _check_disk(folder, layout, len(missing))
        place.mkdir(parents=True, exist_ok=True)
        save_layout(place, layout, facts)
        done, readable, total = 0, 0, sum(len(layout.span(shard)) for shard in share)
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            for shard in share:
                span = layout.span(shard)
                records = list(pool.map(read, span)) if threads else [read(record) for record in span]
                readable += sum(image is not None for images in records for image in images)
                write_shard(layout.path(place, shard), see.entries(records))
                done += len(span)
                show(done, total)
        if share == list(range(layout.num_shards)) and not readable:
            shutil.rmtree(place)
            raise ValueError(f"none of the {num} images can be read; run `tcjax data verify`.")
    wait()
    return Features(place)


def _check_disk(folder: Path, layout: Layout, shards: int) -> None:
    needed = min(shards * layout.per_shard, layout.records) * layout.image_bytes
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise ValueError(
            f"the features of {layout.records} records take {needed / 1e9:,.1f} GB more ({layout.shape[0]} x "
            f"{layout.shape[1]} {layout.dtype} = {layout.image_bytes / 1e6:.2f} MB each, one image per record), and "
            f"{folder} has {free / 1e9:,.1f} GB free; make it a link to a larger disk, cache bfloat16, or train without "
            f"feature_cache."
        )


class _Tower:
    """The tower compiled for `BATCH` images on each of this process's devices, each with all of its weights.

    shape: (N, C) it hands over.
    """

    def __init__(self, tower: nnx.Module, pixels: Pixels, dtype: str):
        graphdef, state = nnx.split(tower)
        ragged = pixels.geometry == "naflex"

        def run(state: Any, images_BYX3: jax.Array, grids_B2: jax.Array) -> jax.Array:
            told = (images_BYX3, grids_B2) if ragged else (images_BYX3,)
            return nnx.merge(graphdef, state)(*told).astype(jnp.dtype(DTYPES[dtype]))

        mesh = Mesh(np.array(jax.local_devices()), ("images",))
        self._state = jax.device_put(own(state), NamedSharding(mesh, PartitionSpec()))
        self._spread = NamedSharding(mesh, PartitionSpec("images"))
        self._run, self._pixels, self._batch = jax.jit(run), pixels, BATCH * mesh.size
        one = (jax.ShapeDtypeStruct((1, *pixels.shape), np.uint8), jax.ShapeDtypeStruct((1, 2), np.int32))
        self.shape: tuple[int, ...] = jax.eval_shape(run, state, *one).shape[1:]

    def entries(self, records: list[list[Seen | None]]) -> list[list[tuple[np.ndarray, np.ndarray | None]]]:
        """Per record, per image, tokens and grid; NaN where there is no image."""
        images = [image for record in records for image in record]
        tokens = iter(self._tokens(images))
        blank = np.zeros(2, np.int32) if self._pixels.geometry == "naflex" else None
        return [[(next(tokens), blank if image is None else image[1]) for image in record] for record in records]

    def _tokens(self, images: list[Seen | None]) -> Iterator[np.ndarray]:
        """One pass is computed while the one before it is handed over."""
        waiting: tuple[jax.Array, list[Seen | None]] | None = None
        for start in range(0, len(images), self._batch):
            some = images[start : start + self._batch]
            running = self._dispatch(some), some
            if waiting is not None:
                yield from _rows(*waiting)
            waiting = running
        if waiting is not None:
            yield from _rows(*waiting)

    def _dispatch(self, images: list[Seen | None]) -> jax.Array:
        images_BYX3 = np.zeros((self._batch, *self._pixels.shape), np.uint8)
        grids_B2 = np.zeros((self._batch, 2), np.int32)
        for i, image in enumerate(images):
            if image is not None:
                images_BYX3[i] = image[0]
                grids_B2[i] = 0 if image[1] is None else image[1]
        return self._run(self._state, *jax.device_put((images_BYX3, grids_B2), self._spread))


def _rows(tokens_BNC: jax.Array, images: list[Seen | None]) -> Iterator[np.ndarray]:
    for tokens_NC, image in zip(np.asarray(tokens_BNC), images, strict=False):
        yield tokens_NC if image is not None else np.full_like(tokens_NC, np.nan)
