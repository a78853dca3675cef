"""compressor.onnx: the compressor alone, weights inside, for onnxruntime and whatever else reads ONNX.

    session = onnxruntime.InferenceSession("compressor.onnx")
    out, out_valid = session.run(None, {"tokens": features, "valid": np.ones(features.shape[:2], bool)})

Batch and, where the compressor reads any number, tokens are dynamic. With onnxruntime installed the golden cases are run
through the file as written, and the manifest says how far they are from JAX.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.config import Run
from tcjax.export import graphs, origin

KIND = "ONNX graph"
_NEEDS = ("torch", "onnx", "onnxscript")


def why_not(run: Run) -> str:
    if reason := origin.why_not(run):
        return reason
    missing = [package for package in _NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} must be installed to write the graph (pip install 'tcjax[onnx]')"
    return ""


def export(run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()) -> Path:
    from tcjax.export.torch.formats import program

    def convert(artifact: Path, building: Path, facts: dict) -> tuple[list[dict], dict]:
        path = building / "compressor.onnx"
        return program.save_onnx(artifact, path, any_num_tokens=facts["any_num_tokens"]), {}

    return graphs.write(KIND, convert, run, model, identity, out=out, root=root)
