"""The README of an artifact: what it is, how to load and check it, what it was trained with, how it scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tcjax.export.certificate import summary

_LOAD = """\
```python
import json
from safetensors.torch import load_file
from modeling_compressor import Compressor

compressor = Compressor(json.load(open("compressor_config.json"))).eval()
compressor.load_state_dict(load_file("compressor.safetensors"))
tokens = compressor(features)  # {shape_in} -> {shape_out}
```"""

_FILES = """\
| file | holds |
|---|---|
| compressor.safetensors | the weights, under the names PyTorch code of this family publishes |
| compressor_config.json | everything the computation depends on: sizes, eps, activation, orders |
| modeling_compressor.py | the module; imports torch only |
| golden.safetensors | probe inputs and masks, and what the trained JAX module answered |
| parity.json | how far the PyTorch module is from those answers |
| verify.py | the check you can repeat |
| manifest.json | SHA-256 of every file, provenance, versions |"""


def card(facts: dict, manifest: dict, certificate: dict, study_rows: Sequence[dict] | None) -> str:
    """Markdown.

    Args:
        facts: the description in compressor_config.json.
        manifest: without the hashes of the files.
        study_rows: one dict per run, the columns in the order in which they should be read; None says so.
    """
    (H, W), extra = facts["grid"], facts.get("extra", 0)
    N = extra + H * W
    grid = f"the class token and a {H} x {W} grid" if extra else f"a {H} x {W} grid without class token"
    Q, C, D = facts["num_queries"], facts["vision_width"], facts["llm_width"]
    tokens_in = f"[batch, {'any number of tokens' if facts['any_num_tokens'] else N}, {C}]"
    about = [
        {"": "family", " ": facts["family"]},
        {"": "tokens in", " ": f"{N}, {grid}, row by row"},
        {"": "tokens out", " ": str(Q)},
        {"": "widths", " ": f"{C} (vision tower) -> {D} (LLM)"},
        {"": "parameters", " ": f"{manifest['parameters']:,}"},
        {"": "weights", " ": f"content hash {manifest['weights']}"},
        {"": "parity", " ": summary(certificate)},
    ]
    results = (
        table(study_rows) if study_rows else "No study was attached to this export; these weights come without a score."
    )
    provenance = [{"fact": key, "value": value} for key, value in flat(manifest["provenance"])]
    return "\n\n".join(
        [
            f"# {facts['family']}: {N} visual tokens become {Q}",
            "A learned visual-token compressor, trained with tcjax between a frozen vision tower and a frozen LLM. "
            "It fits the tower, the layer and the LLM named under Provenance, and no others.",
            table(about),
            "## Load",
            _LOAD.format(shape_in=tokens_in, shape_out=f"[batch, {Q}, {D}]"),
            "A bool mask as second argument, True for real tokens, gives `(tokens, valid)`.",
            "## Check",
            "`python verify.py` needs torch and safetensors: hashes, strict load, parity with the trained JAX module.",
            table(certificate["cases"]) if certificate["cases"] else certificate["note"],
            "## Results",
            results,
            "## Provenance",
            table(provenance) if provenance else "None was recorded.",
            "## Files",
            _FILES,
            "",
        ]
    )


def table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table; columns are all keys in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as (dotted name, value)."""
    if not isinstance(value, dict):
        return [(path, value)]
    return [pair for key, item in value.items() for pair in flat(item, f"{path}.{key}" if path else str(key))]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
