"""The artifact: one folder with the weights, the PyTorch code, the proof that they agree, and where they come from.

    export(model.compressor, config.compressor, config.widths, out, provenance={...}, study_rows=rows)
    artifact = load_artifact(out)          # back into JAX, bit for bit

Written beside its place and renamed at the end, so a folder of that name is whole. It holds no clock: the same input
gives the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tcjax.compressors.base import SCHEMA, Widths
from tcjax.export.card import card
from tcjax.export.certificate import certify, golden, summary, versions
from tcjax.export.families import abstract, describe, twin_source
from tcjax.export.folder import fresh, seal, to_json
from tcjax.interop import names, tensors
from tcjax.interop.artifact import KIND, ArtifactMismatch, check_same, read
from tcjax.record import from_dict, to_dict

__all__ = ["KIND", "Artifact", "ArtifactMismatch", "export", "load_artifact"]


class Artifact(NamedTuple):
    """family, and what rebuilds it: `config.build(widths, rngs)`, then `names.assign(module, arrays)`."""

    family: str
    config: Any
    widths: Widths
    arrays: names.Arrays
    manifest: dict


def export(
    compressor: nnx.Module,
    config: Any,
    widths: Widths,
    out_dir: Path,
    *,
    provenance: Mapping[str, Any],
    study_rows: Sequence[dict] | None = None,
) -> dict:
    """Write the artifact of a trained compressor.

    Args:
        config, widths: what the compressor was built from.
        out_dir: new, empty, or an earlier artifact, which is replaced.
        provenance: tower and LLM with content hashes, feature layer, preprocessing, training config, commit (JSON).
        study_rows: one dict per run for the card's table of results.

    Returns:
        The certificate: `ran`, and per probe case how far PyTorch is from JAX.

    Raises:
        ValueError: no twin for this family, weights that are not finite, a twin that disagrees, or a folder in the way.
    """
    with fresh(out_dir, KIND) as building:
        facts, module = describe(config, widths), abstract(config, widths)
        arrays = finite(names.matching(names.flatten(compressor), names.shapes(module)))
        published = names.to_torch(arrays, config.names(widths))
        certificate = _write(building, published, facts, golden(module, arrays, facts))
        manifest = {
            "schema": SCHEMA,
            "family": facts["family"],
            "config": to_dict(config),
            "widths": to_dict(widths),
            "parameters": sum(array.size for array in arrays.values()),
            "weights": tensors.content_hash(published),
            "provenance": dict(provenance),
            "versions": versions(),
        }
        (building / "README.md").write_text(card(facts, manifest, certificate, study_rows))
        seal(building, KIND, manifest)
    return certificate


def finite(arrays: names.Arrays) -> names.Arrays:
    """The arrays themselves; ValueError naming those that hold NaN or infinity."""
    broken = [path for path, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"not finite: {broken}; such a compressor answers NaN. Export an earlier checkpoint.")
    return arrays


def load_artifact(folder: Path, *, config: Any = None, widths: Widths | None = None) -> Artifact:
    """Read an artifact back, weights bit for bit as they were trained.

    Args:
        config, widths: if given, the compressor these weights must fit.

    Raises:
        ArtifactMismatch: a file is missing or changed, or the artifact is another compressor than asked for.
    """
    manifest, facts, published = read(folder)
    was_config, was_widths = from_dict(manifest["config"]), from_dict(manifest["widths"])
    check_same(facts, describe(was_config, was_widths), f"{folder}/compressor_config.json and this version of tcjax")
    wanted = describe(config or was_config, widths or was_widths)
    check_same(facts, wanted, f"the artifact {folder} and the compressor that is asked for")
    arrays = names.from_torch(
        published,
        was_config.names(was_widths),
        names.shapes(abstract(was_config, was_widths)),
    )
    return Artifact(facts["family"], was_config, was_widths, arrays, manifest)


def _write(building: Path, published: names.Arrays, facts: dict, answers: names.Arrays) -> dict:
    """Everything but card and manifest; the certificate comes from running the files just written."""
    weights = building / "compressor.safetensors"
    twins = resources.files("tcjax.export.torch")
    (building / "compressor_config.json").write_text(to_json(facts))
    (building / "modeling_compressor.py").write_text(twin_source(facts))
    (building / "verify.py").write_text((twins / "verify.py").read_text())
    tensors.save(weights, published)
    tensors.save(building / "golden.safetensors", answers)
    certificate = certify(building)
    (building / "parity.json").write_text(to_json(certificate))
    note = {"family": facts["family"], "weights": certificate["weights"], "parity": summary(certificate)}
    tensors.save(weights, published, {"tcjax": json.dumps(note)})
    return certificate
