"""The artifact: one folder with the weights, the PyTorch code, the proof that they agree, and where they come from.

    export(model.compressor, config.compressor, config.widths, out, provenance={...}, study_rows=rows)
    artifact = load_artifact(out)          # back into JAX, bit for bit

Written beside its place and renamed at the end, so a folder of that name is whole. It holds no clock: the same input
gives the same files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tcjax.compressors.base import SCHEMA, Widths
from tcjax.export.card import card
from tcjax.export.certificate import certify, golden, summary, to_json, versions
from tcjax.export.families import abstract, describe, twin_source
from tcjax.interop import names, tensors
from tcjax.record import file_hash, from_dict, to_dict

KIND = "tcjax compressor"


class Artifact(NamedTuple):
    """family, and what rebuilds it: `config.build(widths, rngs)`, then `names.assign(module, arrays)`."""

    family: str
    config: Any
    widths: Widths
    arrays: names.Arrays
    manifest: dict


class ArtifactMismatch(ValueError):
    """The folder is not the artifact it says, or not the one that is asked for; the message names every difference."""


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
    out_dir = Path(out_dir)
    _refuse_foreign(out_dir)
    facts, module = describe(config, widths), abstract(config, widths)
    arrays = names.matching(names.flatten(compressor), names.shapes(module))
    broken = [path for path, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"not finite: {broken}; such a compressor answers NaN. Export an earlier checkpoint.")
    published = names.to_torch(arrays, config.names(widths))
    building = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.writing")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        certificate = _write(building, published, facts, golden(module, arrays, facts))
        manifest = {
            "kind": KIND,
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
        files = {path.name: file_hash(path) for path in sorted(building.iterdir())}
        (building / "manifest.json").write_text(to_json(manifest | {"files": files}))
        _publish(building, out_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return certificate


def load_artifact(folder: Path, *, config: Any = None, widths: Widths | None = None) -> Artifact:
    """Read an artifact back, weights bit for bit as they were trained.

    Args:
        config, widths: if given, the compressor these weights must fit.

    Raises:
        ArtifactMismatch: a file is missing or changed, or the artifact is another compressor than asked for.
    """
    folder = Path(folder)
    if not is_artifact(folder):
        raise ArtifactMismatch(f"{folder} is no {KIND} artifact: no manifest.json that says so.")
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = [
        name
        for name, digest in manifest["files"].items()
        if not (folder / name).is_file() or file_hash(folder / name) != digest
    ]
    if changed:
        raise ArtifactMismatch(f"{folder}: missing or not what was exported: {changed}; fetch or export it again.")
    facts = json.loads((folder / "compressor_config.json").read_text())
    was_config, was_widths = from_dict(manifest["config"]), from_dict(manifest["widths"])
    _same(facts, describe(was_config, was_widths), f"{folder}/compressor_config.json and this version of tcjax")
    wanted = describe(config or was_config, widths or was_widths)
    _same(facts, wanted, f"the artifact {folder} and the compressor that is asked for")
    arrays = names.from_torch(
        tensors.load(folder / "compressor.safetensors"),
        was_config.names(was_widths),
        names.shapes(abstract(was_config, was_widths)),
    )
    return Artifact(facts["family"], was_config, was_widths, arrays, manifest)


def is_artifact(folder: Path) -> bool:
    """True for a folder whose manifest says that it is one."""
    try:
        return json.loads((Path(folder) / "manifest.json").read_text())["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False


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


def _refuse_foreign(out_dir: Path) -> None:
    if out_dir.is_dir() and any(out_dir.iterdir()) and not is_artifact(out_dir):
        raise ValueError(f"{out_dir} holds something else than an artifact and stays as it is; choose a new folder.")
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; an artifact is a folder.")


def _publish(building: Path, out_dir: Path) -> None:
    """Put the finished folder in its place; an earlier artifact goes only when the new one is whole."""
    earlier = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.earlier")
    if out_dir.exists():
        out_dir.rename(earlier)
    building.rename(out_dir)
    shutil.rmtree(earlier, ignore_errors=True)


def _same(found: dict, expected: dict, what: str) -> None:
    differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if differing:
        lines = "\n".join(f"  {key}: {found.get(key)!r}, {expected.get(key)!r}" for key in differing)
        raise ArtifactMismatch(f"{what} differ:\n{lines}")
