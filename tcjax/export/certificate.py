"""The proof inside an artifact: probe inputs, what the JAX compressor answers, and how far the PyTorch twin is from it.

Shapes and names cannot see a transposed square matrix, swapped keys and values, another merge order, another GELU or
another eps; the probes can. "faint" has tokens of variance 1e-4, where LayerNorm's eps of 1e-5 or 1e-6 shows at 4e-2
instead of 5e-6; "masked" has a full, a padded and an empty image, and NaN where nobody may look.
"""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tcjax import __version__
from tcjax.compressors.base import Compressed, Context
from tcjax.interop import names, tensors

_SEED = 0
_TEXT = 5  # positions of a probe's instruction
FIELDS = {  # argument of the twin: field of the context
    "valid": "valid_BN",
    "text": "text_BTD",
    "text_valid": "text_valid_BT",
    "levels": "levels_BNE",
    "prior": "prior_BN",
}


def golden(compressor: Any, arrays: names.Arrays, facts: dict) -> names.Arrays:
    """{case}.tokens, {case}.valid and so on, {case}.out, {case}.out_valid: inputs, and JAX's answers in float32 on a CPU.

    Args:
        compressor: the abstract module (families.abstract); it is filled with `arrays`.
        facts: the description (families.describe).
    """
    with jax.default_device(reference_device()), jax.default_matmul_precision("highest"):
        names.assign(compressor, arrays)
        graphdef, state = nnx.split(compressor)

        @jax.jit
        def answer(state: nnx.State, inputs: dict[str, jax.Array]) -> Compressed:
            told: dict[str, Any] = {field: inputs[name] for name, field in FIELDS.items() if name in inputs}
            return nnx.merge(graphdef, state)(inputs["tokens"], Context(**told))

        found: names.Arrays = {}
        for case, inputs in probes(facts).items():
            compressed = answer(state, inputs)
            found |= {f"{case}.{name}": array for name, array in inputs.items()}
            found[f"{case}.out"] = np.asarray(compressed.tokens_BQD)
            if compressed.valid_BQ is not None:
                found[f"{case}.out_valid"] = np.asarray(compressed.valid_BQ)
        return found


def probes(facts: dict) -> dict[str, dict[str, np.ndarray]]:
    """Inputs by case, under the names of the twin's arguments. A pure function of the description."""
    random = np.random.RandomState(_SEED)
    each = facts.get("extra", 0) + facts["grid"][0] * facts["grid"][1]
    N, C = facts["frames"] * each, facts["vision_width"]

    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    valid_BN = np.stack([np.ones(N, bool), np.arange(N) < (5 * N + 7) // 8, np.zeros(N, bool)])
    valid_BN[1] &= random.random_sample(N) < 0.8
    valid_BN[1, 0] = True  # at least one, whatever N is
    hidden_BNC = np.where(valid_BN, 1, np.nan).astype(np.float32)[..., None]
    cases: dict[str, dict[str, np.ndarray]] = {
        "plain": {"tokens": 2 * noise(2, N, C) + 1},
        "masked": {"tokens": noise(3, N, C) * hidden_BNC, "valid": valid_BN},
        "faint": {"tokens": 0.01 * noise(1, N, C)},
    }
    if facts["any_num_tokens"]:
        cases["odd"] = {"tokens": noise(2, max(1, N - 1 - N % 2), C)}
    for inputs in cases.values():
        B, N, _ = inputs["tokens"].shape
        hidden = hidden_BNC if "valid" in inputs else np.float32(1)
        if "text" in facts["needs"]:
            # Partly padded, the null text, and (beside the empty image, which answers nothing) a full one.
            text_valid_BT = np.arange(_TEXT) < np.array([_TEXT - 2, 0, _TEXT])[:B, None]
            unread_BTD = np.where(text_valid_BT, 1, np.nan).astype(np.float32)[..., None]
            inputs |= {"text": noise(B, _TEXT, facts["text_width"]) * unread_BTD, "text_valid": text_valid_BT}
        if "levels" in facts["needs"]:
            inputs["levels"] = (noise(B, N, facts["levels"] * C) * hidden).astype(np.float32)
        if "prior" in facts["needs"]:
            inputs["prior"] = np.abs(noise(B, N))
    return cases


def certify(folder: Path) -> dict:
    """Run the twin on the artifact being written and say how close it is.

    Raises:
        ValueError: PyTorch is here and does not compute what JAX computed; such an artifact is not published.
    """
    certificate = {
        "tolerance": 1e-5,
        "measure": "largest absolute difference over largest absolute output, per case",
        "precision": "float32 on CPU, highest matmul precision",
        "weights": tensors.content_hash(folder / "compressor.safetensors"),
        "golden": tensors.content_hash(folder / "golden.safetensors"),
        "versions": versions(),
    }
    if importlib.util.find_spec("torch") is None:
        note = "not run here: PyTorch is not installed; `python verify.py` runs it where it is"
        return certificate | {"ran": False, "note": note, "cases": []}
    from tcjax.export.torch import verify

    report = verify.check(folder, hashes=False)
    if report["problems"]:
        raise ValueError(
            f"the PyTorch twin does not compute what was trained; nothing was exported:\n{verify.table(report)}"
        )
    cases = [{key: value for key, value in row.items() if key != "problem"} for row in report["cases"]]
    return certificate | {"ran": True, "note": f"run with torch {report['torch']}", "cases": cases}


def summary(certificate: dict) -> str:
    """One line for the weight file's own metadata and the card."""
    if not certificate["ran"]:
        return certificate["note"]
    worst = max(row["relative"] for row in certificate["cases"])
    return f"PyTorch equals JAX to {worst:.1e} of the largest output over {len(certificate['cases'])} probe cases"


def versions() -> dict[str, str]:
    """What wrote this: our version and those of the libraries the numbers went through."""
    found = {"tcjax": __version__, "python": platform.python_version()}
    for package in ("jax", "flax", "numpy", "safetensors", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def reference_device() -> Any:
    """A CPU if this process may use one: a TPU's highest precision still rounds differently."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
