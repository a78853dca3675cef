"""Exporting a run: the trained compressor as an artifact, or every trained part as plain safetensors.

artifact    tcjax.export.artifact: weights, PyTorch code, certificate, manifest, card
parts       one file per part that learned: tower.safetensors and llm.safetensors under their published names (they
            load in transformers), projector.safetensors under our own leaf paths (`TrainConfig.weights` reads it)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.assemble import published_names
from tcjax.config import Run
from tcjax.export.artifact import export
from tcjax.interop import names, tensors
from tcjax.record import to_dict, write_json
from tcjax.train.log import commit
from tcjax.vlm import Vlm, VlmConfig

PARTS = {"tower": "tower.safetensors", "compressor": "projector.safetensors", "llm": "llm.safetensors"}


def export_artifact(
    run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()
) -> Path:
    """The artifact of the run's compressor in `out`; `rows` are the study's results for its card."""
    config = run.model
    if not isinstance(config, VlmConfig) or not isinstance(model, Vlm):
        raise ValueError(
            f"{run.name} trains a {type(config).__name__}, which has no compressor to export; try --to parts."
        )
    provenance = {
        "run": run.name,
        "commit": commit(root),
        "tower": identity["tower.weights"],
        "llm": identity["llm.weights"],
        "feature_layer": config.seen.feature_layer,
        "levels": list(config.seen.levels),
        "image_resized_to_grid": config.seen.shrunk_HW,
        "class_token": "dropped" if config.seen.class_token else "none",
        "pixels": to_dict(config.seen.pixels),
        "train": to_dict(run.train),
        "data": to_dict(run.data),
    }
    export(
        model.compressor, config.compressor, config.widths, out, provenance=provenance, study_rows=list(rows) or None
    )
    return out


def export_parts(
    run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()
) -> Path:
    """Every part that learned, as safetensors in `out`, and parts.json with their content hashes and origin."""
    written = {}
    for part in run.train.trainable:
        if part not in PARTS:
            continue  # the heads of dense labels are thrown away
        arrays = names.flatten(getattr(model, part))
        if part != "compressor":
            arrays = names.to_torch(arrays, published_names(getattr(run.model, part))[0])
        tensors.save(out / PARTS[part], arrays, {"run": run.name})
        written[PARTS[part]] = {
            "content_hash": tensors.content_hash(arrays),
            "parameters": sum(array.size for array in arrays.values()),
            "run": run.name,
            "commit": commit(root),
            "stands_on": {fact: value for fact, value in identity.items() if fact.endswith(".weights")},
        }
    if not written:
        raise ValueError(f"{run.name} trains {run.train.trainable}; only {sorted(PARTS)} can be exported as parts.")
    write_json(out / f"{run.name.rpartition('/')[2]}.json", written)
    return out


EXPORTS = {"artifact": export_artifact, "parts": export_parts}
