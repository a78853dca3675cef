"""What a run would be, before it is paid for: parameters, memory, FLOPs, steps and the first rendered sample.

Nothing is loaded, compiled or run: the model is built abstractly, and memory is counted on shapes. Per device:

    weights       of every part, in the type it lies in memory
    training      gradient and both moments of what learns, float32
    activations   what the backward pass keeps of one microbatch, read off the jaxpr of the loss

What the compiler needs beside that (workspace, gathered shards, with `remat` one block's own activations) is not in it.
"""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tcjax.batch import Batch
from tcjax.config import MeshConfig, Run
from tcjax.pipeline.chat import Chat, Composed, open_chat
from tcjax.pipeline.source import open_source
from tcjax.shapes import abstract_batch, held, parts, useful_flops, ways
from tcjax.sharding import MESH_AXES, check_batch
from tcjax.train.state import cast, compute_dtype, part_of


def dry_run(run: Run, *, root: Path) -> dict[str, Any]:
    """The figures of a run on the mesh its config asks for, whatever devices are here; -1 takes the local ones.

    Returns:
        parameters and learning {part: number}; weights, training, activations: bytes per device; flops: useful ones per
        step, None where no formula is known; mesh; steps; samples; records, epochs and sample (pieces of the first row,
        {text, supervised, positions}) are None where the data cannot be opened, and `missing` says why.
    """
    config: Any = run.model
    mesh = _mesh(run.mesh)
    check_batch(run.data.batch, mesh, run.train.accumulate)
    graphdef, trainable, frozen = parts(run)
    learned = held(trainable, mesh)
    figures: dict[str, Any] = {
        "parameters": _of_parts(trainable, frozen),
        "learning": _of_parts(trainable),
        "weights": learned + held(frozen, mesh),
        "training": 3 * learned,
        "activations": _kept(run, graphdef, trainable, frozen, mesh),
        "mesh": dict(mesh.shape),
        "steps": run.train.steps,
        "samples": run.train.steps * run.data.batch,
        "flops": useful_flops(run),
    }
    return figures | _data(run, root, config.num_queries)


def _mesh(config: MeshConfig) -> AbstractMesh:
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(jax.device_count() // math.prod(size for size in sizes if size != -1), 1)
    if min(sizes) < 1:
        raise ValueError(f"mesh sizes are positive, and at most one is -1 (what the others leave); got {config}.")
    return AbstractMesh(tuple(sizes), MESH_AXES)


def _of_parts(*states: Any) -> dict[str, int]:
    """Parameters by part."""
    counts: dict[str, int] = {}
    for path, leaf in (pair for state in states for pair in nnx.to_flat_state(state)):
        counts[part_of(path)] = counts.get(part_of(path), 0) + math.prod(leaf.get_value().shape)
    return counts


def _kept(run: Run, graphdef: Any, trainable: Any, frozen: Any, mesh: AbstractMesh) -> int:
    """Bytes that one device keeps from a microbatch's forward to its backward pass, weights not counted again."""
    rows = run.data.batch // (mesh.shape["data"] * mesh.shape["fsdp"] * run.train.accumulate)
    dtype = compute_dtype(run.train.compute)
    batch = abstract_batch(run, rows)

    def pull_back(trainable: Any, frozen: Any, batch: Batch) -> Any:
        def total(trainable: Any) -> jax.Array:
            model = nnx.merge(graphdef, cast(trainable, dtype), cast(frozen, dtype))
            return model.loss_terms(cast(batch, dtype)).total

        return jax.vjp(total, trainable)[1]

    jaxpr = jax.make_jaxpr(pull_back)(trainable, frozen, batch).jaxpr
    given = {id(variable) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    kept = {id(variable): variable.aval for variable in jaxpr.outvars if id(variable) not in given}
    # A weight in the type of the computation lies as the weight does; everything else belongs to this device's rows.
    split_ways = {
        leaf.get_value().shape: ways(leaf, leaf.get_value(), mesh) for _, leaf in nnx.to_flat_state(trainable)
    }
    return sum(
        math.prod(aval.shape) * aval.dtype.itemsize // split_ways.get(aval.shape, 1)  # pyright: ignore
        for aval in kept.values()
    )


def _data(run: Run, root: Path, num_queries: int) -> dict[str, Any]:
    """The first sample as it would be trained on, and how long the data is; what is missing says itself."""
    try:
        chat = open_chat(root / run.data.tokenizer, run.data.template)
        sources = [open_source(root, source) for source in run.data.sources]
        record = sources[0][0]
        composed = chat.compose(
            record.turns,
            num_queries=num_queries,
            text_length=run.data.text_length,
            num_images=len(record.images),
            name=record.image_id,
        )
    except ValueError as error:
        return {"records": None, "epochs": None, "sample": None, "missing": str(error)}
    records = sum(map(len, sources))
    # How many samples a packed row holds is known once the lengths are measured.
    epochs = None if run.data.batching == "packed" else run.train.steps * run.data.batch / records
    return {"records": records, "epochs": epochs, "sample": _pieces(composed, chat), "missing": ""}


def _pieces(composed: Composed, chat: Chat) -> list[dict[str, Any]]:
    """Runs of tokens of one kind; the image's have no text."""
    pieces = []
    tokens = zip(composed.ids, composed.is_image, composed.supervised, strict=True)
    for (is_image, supervised), run in groupby(tokens, key=lambda token: (token[1], token[2])):
        ids = [token[0] for token in run]
        text = "" if is_image else chat.tokenizer.decode(ids, skip_special_tokens=False)
        pieces.append({"text": text, "supervised": supervised, "positions": len(ids)})
    return pieces


def show(run: Run, figures: dict[str, Any], *, about: str = "") -> None:
    """Print the figures and the sample, supervised tokens underlined. about: what the config says of itself."""
    console, table = Console(), Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    console.print(Text(f"{run.name}\n{about}".strip()))
    for part, number in figures["parameters"].items():
        learning = figures["learning"].get(part, 0)
        table.add_row(part, f"{number:,} parameters", f"{learning:,} learn" if learning else "frozen")
    axes = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    table.add_row("mesh", axes, f"batch {run.data.batch}")
    held = {name: figures[name] for name in ("weights", "training", "activations")}
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in held.items())
    table.add_row("memory per device", _bytes(sum(held.values())), parts)
    if figures["flops"] is not None:
        table.add_row(
            "useful FLOPs per step", f"{figures['flops'] / 1e12:.3g} T", "every position filled and supervised"
        )
    seen = f"{figures['samples']:,} {'packed rows' if run.data.batching == 'packed' else 'samples'}"
    if figures["epochs"] is not None:
        seen += f", {figures['epochs']:.3g} epochs of {figures['records']:,}"
    table.add_row("steps", f"{figures['steps']:,}", seen)
    console.print(table)
    if figures["sample"] is None:
        console.print(Text(f"no sample: {figures['missing']}"))
        return
    text = Text()
    for piece in figures["sample"]:
        shown = piece["text"] or f"[{piece['positions']} visual tokens]"
        text.append(shown, "underline green" if piece["supervised"] else "" if piece["text"] else "cyan")
    console.print(text)


def _bytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
