"""compressor.jax: the compressor as one StableHLO program for CPU, CUDA and TPU, for JAX without our code.

    program = jax.export.deserialize(open("compressor.jax", "rb").read())
    weights = safetensors.numpy.load_file("compressor.safetensors")          # under our own leaf paths
    tokens, valid = program.call(weights, {"tokens": features, "valid": numpy.ones(features.shape[:2], bool)})

JAX promises to load such a program for half a year, so the manifest carries the day after which nothing is promised
(`loads_until`); it serves, it does not archive. The artifact is what lasts. Batch is any size, tokens where the
compressor reads any number. Only XLA's own operations are inside: custom kernels have no such promise.
"""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import Context
from tcjax.config import Run
from tcjax.export import graphs, origin
from tcjax.export.certificate import FIELDS
from tcjax.interop import names, tensors

KIND = "jax.export program"
PLATFORMS = ("cpu", "cuda", "tpu")
PROMISE = datetime.timedelta(days=180)  # of jax.export, backwards; three weeks forwards


def why_not(run: Run) -> str:
    if reason := origin.why_not(run):
        return reason
    if importlib.util.find_spec("flatbuffers") is None:
        return "jax.export writes flatbuffers, and the package is not installed (pip install 'tcjax[serve]')"
    return ""


def export(run: Run, model: Any, identity: dict[str, Any], *, out: Path, root: Path, rows: Sequence[dict] = ()) -> Path:
    today = datetime.datetime.now(datetime.UTC).date()

    def convert(artifact: Path, building: Path, facts: dict) -> tuple[list[dict], dict]:
        golden = tensors.load(artifact / "golden.safetensors")
        weights = names.flatten(model.compressor)
        tensors.save(building / "compressor.safetensors", weights)
        exported, any_num_tokens = _program(model.compressor, weights, golden, facts)
        path = building / "compressor.jax"
        path.write_bytes(exported.serialize())
        cases = _compared(jax.export.deserialize(bytearray(path.read_bytes())), weights, golden)
        more = {"any_num_tokens": any_num_tokens, "platforms": list(PLATFORMS)}
        return cases, more | {"written": str(today), "loads_until": str(today + PROMISE)}

    return graphs.write(KIND, convert, run, model, identity, out=out, root=root)


def _program(compressor: nnx.Module, weights: names.Arrays, golden: names.Arrays, facts: dict) -> tuple[Any, bool]:
    """The program, and whether it takes any number of tokens; one that computes with that number in Python has it fixed."""
    graphdef, state = nnx.split(compressor)
    flat = nnx.to_flat_state(state)

    def answer(weights: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        filled = [(path, leaf.replace(weights["/".join(map(str, path))])) for path, leaf in flat if _is_weight(leaf)]
        rest = [(path, leaf) for path, leaf in flat if not _is_weight(leaf)]
        module = nnx.merge(graphdef, nnx.from_flat_state([*filled, *rest]))

        def one(inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """A batch of one: the compressor never meets a batch size that is no number."""
            told: dict[str, Any] = {FIELDS[name]: array[None] for name, array in inputs.items() if name != "tokens"}
            out = module(inputs["tokens"][None], Context(**told))
            valid_BQ = out.valid_BQ if out.valid_BQ is not None else jnp.ones(out.tokens_BQD.shape[:2], bool)
            return out.tokens_BQD[0], valid_BQ[0]

        return jax.vmap(one)(inputs)

    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    with jax.default_matmul_precision("highest"):
        exporter = jax.export.export(jax.jit(answer), platforms=PLATFORMS)
        if facts["any_num_tokens"]:
            try:
                return exporter(abstract, _shapes(golden, "n", facts)), True
            except (TypeError, ValueError, jax.errors.InconclusiveDimensionOperation):  # `range(n)`, a branch on n
                pass
        return exporter(abstract, _shapes(golden, "", facts)), False


def _is_weight(leaf: nnx.Variable) -> bool:
    return not isinstance(leaf, nnx.RngState)


def _shapes(golden: names.Arrays, num_tokens: str, facts: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs with symbolic sizes: batch b, text t, tokens `num_tokens` or as many as in the golden case."""
    limit = [f"t <= {facts['max_text']}"] if facts.get("max_text") else []
    scope, shapes = jax.export.SymbolicScope(limit), {}
    for name, array in _inputs(golden, "masked").items():
        second = "t" if name.startswith("text") else num_tokens or str(array.shape[1])
        spec = ", ".join(["b", second, *map(str, array.shape[2:])])
        shapes[name] = jax.ShapeDtypeStruct(jax.export.symbolic_shape(spec, scope=scope), array.dtype)
    return shapes


def _inputs(golden: names.Arrays, case: str) -> dict[str, np.ndarray]:
    """All inputs of a golden case, "valid" too where the case has none."""
    found = {name: golden[f"{case}.{name}"] for name in ("tokens", *FIELDS) if f"{case}.{name}" in golden}
    return {"valid": np.ones(found["tokens"].shape[:2], bool)} | found


def _compared(program: Any, weights: names.Arrays, golden: names.Arrays) -> list[dict]:
    rows, fixed = [], program.in_avals[-1].shape[1]
    for case in sorted(name.removesuffix(".tokens") for name in golden if name.endswith(".tokens")):
        if isinstance(fixed, int) and golden[f"{case}.tokens"].shape[1] != fixed:
            continue
        out, out_valid = program.call(weights, _inputs(golden, case))
        expected, expected_valid = golden[f"{case}.out"], golden.get(f"{case}.out_valid")
        if expected_valid is not None and not np.array_equal(out_valid, expected_valid):
            raise ValueError(f"{case}: other outputs of the program are valid than before.")
        relative = float(np.abs(out - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))
        if not relative <= 1e-5:
            raise ValueError(
                f"{case}: the program is off by {relative:.1e} of the largest output; nothing is exported."
            )
        rows.append({"case": case, "tokens": list(golden[f"{case}.tokens"].shape), "relative": relative})
    return rows
