"""Exporting a run: `TARGETS` is the table of what `tcjax export --to` can write, one file per target.

Each target says `why_not(run)` ("" if it accepts the run's compressor) and does `export(run, model, identity, ...)`.

artifact    tcjax.export.artifact: weights, PyTorch code, certificate, manifest, card
parts       one file per part that learned: tower.safetensors and llm.safetensors under their published names (they
            load in transformers; a LoRA is merged into the LLM), projector.safetensors under our own leaf paths
            (`TrainConfig.weights` reads it)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tcjax.assemble import published_names
from tcjax.config import Run
from tcjax.export import hf, hf_remote, jax_export, llava, llm, onnx, origin, torch_export
from tcjax.export.artifact import export
from tcjax.interop import names, tensors
from tcjax.nn import lora
from tcjax.record import write_json
from tcjax.train.log import commit
from tcjax.vlm import Vlm, VlmConfig

PARTS = {"tower": "tower.safetensors", "compressor": "projector.safetensors", "llm": "llm.safetensors"}


def export_artifact(
    run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()
) -> Path:
    """The artifact of the run's compressor in `out`; `rows` are the study's results for its card."""
    config = run.model
    if not isinstance(config, VlmConfig) or not isinstance(model, Vlm):
        raise ValueError(f"{origin.why_not(run)}.")
    provenance = origin.provenance(run, identity, root)
    export(
        model.compressor, config.compressor, config.widths, out, provenance=provenance, study_rows=list(rows) or None
    )
    return out


def export_parts(
    run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()
) -> Path:
    """Every part that learned, as safetensors in `out`, and parts.json with their content hashes and origin."""
    written = {}
    for part in _parts(run):
        module = getattr(model, part)
        arrays = lora.merged(module, names.flatten(module))
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


def _why_no_parts(run: Run) -> str:
    if _parts(run):
        return ""
    return f"{run.name} trains {run.train.trainable}; only {sorted(PARTS)} can be exported as parts"


def _parts(run: Run) -> list[str]:
    """Parts that came to be what they are by training. The heads of dense labels are thrown away."""
    changed = dict.fromkeys("llm" if part == lora.PART else part for part in run.train.trainable)
    return [part for part in changed if part in PARTS]


class Target(NamedTuple):
    """about: what is written. why_not: "" if the run's compressor is accepted. export: writes it, returns the folder."""

    about: str
    why_not: Callable[[Run], str]
    export: Callable[..., Path]


TARGETS = {
    "artifact": Target("weights, PyTorch code, certificate, card", origin.why_not, export_artifact),
    "parts": Target("every trained part as safetensors", _why_no_parts, export_parts),
    "llm": Target("the trained LLM as a published checkpoint, LoRA merged", llm.why_not, llm.export),
    "hf": Target("a Hugging Face directory of a stock class", hf.why_not, hf.export),
    "hf-remote": Target("a Llava directory with the compressor's own code", hf_remote.why_not, hf_remote.export),
    "llava": Target("mm_projector.bin of the original LLaVA", llava.why_not, llava.export),
    "onnx": Target("compressor.onnx", onnx.why_not, onnx.export),
    "torch-export": Target("compressor.pt2 of torch.export", torch_export.why_not, torch_export.export),
    "jax-export": Target("compressor.jax of jax.export, for half a year", jax_export.why_not, jax_export.export),
}


def export_run(
    target: str, run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()
) -> Path:
    """Write one target of a trained run; ValueError says why it cannot be, and what can."""
    reason = TARGETS[target].why_not(run)
    if reason:
        others = [name for name, other in TARGETS.items() if not other.why_not(run)]
        raise ValueError(f"--to {target} cannot hold this run: {reason}. These can: {', '.join(others) or 'none'}.")
    return TARGETS[target].export(run, model, identity, out=out, root=root, rows=rows)
