"""LLaVA's own file: mm_projector.bin, as `--pretrain_mm_mlp_adapter` and the adapter-only loader of LLaVA-1.5 read it.

    model.mm_projector.0.weight [D, C]   .0.bias   .2.weight [D, D]   .2.bias        (mlp2x_gelu; one layer is "linear")

Only the plain MLP: LLaVA builds nothing else, and loads what it does not know without a word (strict=False).
config.json holds the fields that belong to it, to be merged into the language model's own.
Source: haotian-liu/LLaVA, llava/model/llava_arch.py and multimodal_projector/builder.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcjax.config import Run
from tcjax.export import origin
from tcjax.export.artifact import finite
from tcjax.export.certificate import versions
from tcjax.export.folder import fresh, seal, to_json
from tcjax.interop import names, tensors
from tcjax.towers.dual import DualConfig

KIND = "LLaVA projector"


def why_not(run: Run) -> str:
    if reason := origin.why_not(run):
        return reason
    if origin.family(run) != "mlp":
        return f"LLaVA builds linear and mlpNx_gelu projectors only, not {origin.family(run)}"
    tower = run.model.seen  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(tower, DualConfig):
        return "LLaVA has one tower, this run two side by side"
    if tower.norms_last:
        return "LLaVA reads the tower before its last norm, this one is read after it (feature_layer=-1 with post_norm)"
    if importlib.util.find_spec("torch") is None:
        return "the file is a torch pickle, and PyTorch is not installed (pip install 'tcjax[torch]')"
    return ""


def export(run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()) -> Path:
    """mm_projector.bin, read back and compared bit for bit, and config.json."""
    from tcjax.export.torch.formats import pickled

    facts, config = origin.facts(run), run.model
    published = names.to_torch(
        finite(names.flatten(model.compressor)),
        config.compressor.names(config.widths),  # pyright: ignore[reportAttributeAccessIssue]
    )
    linear = facts["depth"] == 1
    prefix = "model.mm_projector."
    arrays = {prefix + (key.removeprefix("0.") if linear else key): array for key, array in published.items()}
    with fresh(out, KIND) as building:
        pickled.save(building / "mm_projector.bin", arrays)
        read = pickled.load(building / "mm_projector.bin")
        if tensors.content_hash(read) != tensors.content_hash(arrays):
            raise OSError(f"{out}: what was read back differs from what was written.")
        tower = config.seen  # pyright: ignore[reportAttributeAccessIssue]
        (building / "config.json").write_text(
            to_json(
                {
                    "mm_projector_type": "linear" if linear else f"mlp{facts['depth']}x_gelu",
                    "mm_hidden_size": facts["vision_width"],
                    "hidden_size": facts["llm_width"],
                    "mm_vision_tower": tower.weights,
                    "mm_vision_select_layer": tower.feature_layer,
                    "mm_vision_select_feature": "patch",
                    "mm_patch_merge_type": "flat",
                    "mm_use_im_start_end": False,
                    "mm_use_im_patch_token": False,
                    "use_mm_proj": True,
                    "image_aspect_ratio": None,
                }
            )
        )
        seal(
            building,
            KIND,
            {
                "weights": tensors.content_hash(arrays),
                "provenance": origin.provenance(run, identity, root),
                "versions": versions(),
            },
        )
    return out
