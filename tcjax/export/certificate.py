"""The proof inside an artifact: probe inputs, what the JAX compressor answers, and how far the PyTorch twin is from it.

Shapes and names cannot see a transposed square matrix, swapped keys and values, another merge order, another GELU or
another eps; the probes can. "faint" has tokens of variance 1e-4, where LayerNorm's eps of 1e-5 or 1e-6 shows at 4e-2
instead of 5e-6; "masked" has a full, a padded and an empty image, and NaN where nobody may look.
"""

from __future__ import annotations

import importlib.util
import json
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


def golden(compressor: Any, arrays: names.Arrays, facts: dict) -> names.Arrays:
    """{case}.tokens, {case}.valid, {case}.out, {case}.out_valid: inputs, and JAX's answers in float32 on a CPU.

    Args:
        compressor: the abstract module (families.abstract); it is filled with `arrays`.
        facts: the description (families.describe).
    """
    with jax.default_device(_reference_device()), jax.default_matmul_precision("highest"):
        names.assign(compressor, arrays)
        graphdef, state = nnx.split(compressor)

        @jax.jit
        def answer(state: nnx.State, tokens_BNC: jax.Array, valid_BN: jax.Array | None) -> Compressed:
            return nnx.merge(graphdef, state)(tokens_BNC, Context(valid_BN))

        found: names.Arrays = {}
        for case, (tokens_BNC, valid_BN) in probes(facts).items():
            compressed = answer(state, tokens_BNC, valid_BN)
            found |= {f"{case}.tokens": tokens_BNC, f"{case}.out": np.asarray(compressed.tokens_BQD)}
            if valid_BN is not None:
                found |= {f"{case}.valid": valid_BN, f"{case}.out_valid": np.asarray(compressed.valid_BQ)}
        return found


def probes(facts: dict) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Inputs by case: tokens_BNC and a mask or None. A pure function of the description."""
    random = np.random.RandomState(_SEED)
    N, C = facts["grid"][0] * facts["grid"][1], facts["vision_width"]

    def noise(B: int, N: int) -> np.ndarray:
        return random.standard_normal((B, N, C)).astype(np.float32)

    valid_BN = np.stack([np.ones(N, bool), np.arange(N) < (5 * N + 7) // 8, np.zeros(N, bool)])
    valid_BN[1] &= random.random_sample(N) < 0.8
    valid_BN[1, 0] = True  # at least one, whatever N is
    masked_BNC = noise(3, N) * np.where(valid_BN, 1, np.nan).astype(np.float32)[..., None]
    cases: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
        "plain": (2 * noise(2, N) + 1, None),
        "masked": (masked_BNC, valid_BN),
        "faint": (0.01 * noise(1, N), None),
    }
    if facts["any_num_tokens"]:
        odd = max(1, N - 1 - N % 2)
        cases["odd"] = (noise(2, odd), None)
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


def to_json(value: dict) -> str:
    return json.dumps(value, indent=1) + "\n"


def _reference_device() -> Any:
    """A CPU if this process may use one: a TPU's highest precision still rounds differently."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
