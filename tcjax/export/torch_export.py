"""compressor.pt2: the compressor as a torch.export program, for PyTorch without our code, AOTInductor and ExecuTorch.

    graph = torch.export.load("compressor.pt2").module()
    tokens, valid = graph(tokens=features, valid=torch.ones(features.shape[:2], dtype=torch.bool))

Batch and, where the compressor reads any number, tokens are dynamic. The golden cases are run through the file as written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.config import Run
from tcjax.export import graphs, origin

KIND = "torch.export program"


def why_not(run: Run) -> str:
    if reason := origin.why_not(run):
        return reason
    if importlib.util.find_spec("torch") is None:
        return "PyTorch writes the program, and it is not installed (pip install 'tcjax[torch]')"
    return ""


def export(run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()) -> Path:
    from tcjax.export.torch.formats import program

    def convert(artifact: Path, building: Path, facts: dict) -> tuple[list[dict], dict]:
        path = building / "compressor.pt2"
        return program.save_torch_export(artifact, path, any_num_tokens=facts["any_num_tokens"]), {}

    return graphs.write(KIND, convert, run, model, identity, out=out, root=root)
