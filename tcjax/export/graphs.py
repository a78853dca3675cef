"""What the graph formats share: an artifact is written, converted, and left behind but for its config and golden cases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcjax.config import Run
from tcjax.export import origin
from tcjax.export.artifact import export
from tcjax.export.certificate import versions
from tcjax.export.folder import fresh, seal
from tcjax.vlm import VlmConfig

# (artifact, building, facts) -> rows of the golden cases ([] if they could not be run here), further facts of the manifest
Convert = Callable[[Path, Path, dict], tuple[list[dict], dict]]


def write(
    kind: str,
    convert: Convert,
    run: Run,
    model: Any,
    identity: dict[str, Any],
    *,
    out: Path,
    root: Path,
) -> Path:
    """The folder of one graph: the graph, compressor_config.json, golden.safetensors, manifest.json."""
    config = run.model
    assert isinstance(config, VlmConfig)
    provenance = origin.provenance(run, identity, root)
    with fresh(out, kind) as building:
        source = building / "source"
        export(model.compressor, config.compressor, config.widths, source, provenance=provenance)
        cases, more = convert(source, building, origin.facts(run))
        for name in ("compressor_config.json", "golden.safetensors"):
            (source / name).rename(building / name)
        shutil.rmtree(source)
        parity = {
            "measure": "largest absolute difference from JAX over largest absolute output, per golden case",
            "ran": bool(cases),
            "cases": cases,
        }
        seal(building, kind, {"parity": parity, **more, "provenance": provenance, "versions": versions()})
    return out
