"""What every target asks of a trained run first: does it have a compressor with a twin, and where do its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tcjax.compressors.base import CompressorConfig
from tcjax.config import Run
from tcjax.export.families import has_twin, twins
from tcjax.record import to_dict
from tcjax.towers.dual import DualConfig
from tcjax.train.log import commit
from tcjax.vlm import VlmConfig


def why_not(run: Run) -> str:
    """Why this run has nothing to export as a compressor; "" if it has."""
    if not isinstance(run.model, VlmConfig):
        return f"{run.name} trains a {type(run.model).__name__}, which has no compressor to export; try --to parts"
    if not has_twin(run.model.compressor):
        return f"{family(run)} has no PyTorch twin; these have one: {', '.join(twins())}"
    return ""


def family(run: Run) -> str:
    """What the run's compressor is called, as its file is."""
    compressor = getattr(run.model, "compressor", None)
    return compressor.family if isinstance(compressor, CompressorConfig) else type(compressor).__module__


def facts(run: Run) -> dict[str, Any]:
    """The description of the run's compressor (compressor_config.json)."""
    config = run.model
    assert isinstance(config, VlmConfig) and isinstance(config.compressor, CompressorConfig), why_not(run)
    return config.compressor.describe(config.widths)


def provenance(run: Run, identity: dict[str, Any], root: Path) -> dict[str, Any]:
    """Tower and LLM with content hashes, feature layer, preprocessing, training config, commit."""
    config = run.model
    assert isinstance(config, VlmConfig)
    towers = config.seen.towers if isinstance(config.seen, DualConfig) else (config.seen,)
    layers = [tower.feature_layer for tower in towers]
    return {
        "run": run.name,
        "commit": commit(root),
        "tower": identity["tower.weights"],
        "llm": identity["llm.weights"],
        "feature_layer": layers if len(layers) > 1 else layers[0],
        "levels": list(config.seen.levels),
        "image_resized_to_grid": towers[0].shrunk_HW,
        "class_token": "kept"
        if config.seen.keep_class
        else "dropped"
        if any(tower.class_token for tower in towers)
        else "none",
        "pixels": to_dict(config.seen.pixels),
        "train": to_dict(run.train),
        "data": to_dict(run.data),
    }
