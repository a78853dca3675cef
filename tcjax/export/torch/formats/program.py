"""The twin of an artifact as one graph: a torch.export program (.pt2) or an ONNX file, and how far each is from JAX.

Both graphs take the masked form, (tokens, valid, ...) -> (tokens, valid), by the twin's own argument names; the batch is
any size, and so is the number of tokens where the compressor reads any number.
"""

import inspect
import logging
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch._dynamo.exc import UserError

from tcjax.export.torch import verify


def save_torch_export(artifact: Path, path: Path, *, any_num_tokens: bool) -> list[dict]:
    """Write `path` (.pt2), load it again and run the artifact's golden cases; one row per case, as in verify.py."""
    program = _exported(artifact, any_num_tokens)
    program.example_inputs = None  # they would travel as a pickle
    torch.export.save(program, path)
    graph = torch.export.load(path).module()
    return _compared(artifact, lambda inputs: graph(**inputs))


def save_onnx(artifact: Path, path: Path, *, any_num_tokens: bool) -> list[dict]:
    """Write `path` (.onnx), one file with its weights; the rows of its golden cases, none without onnxruntime."""
    inputs = _inputs(artifact, "masked")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecated calls
        program = torch.onnx.export(
            _exported(artifact, any_num_tokens),
            kwargs=inputs,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=list(inputs),
            output_names=["out", "out_valid"],
        )
        assert program is not None
        program.save(str(path), external_data=False)
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]  an extra
    except ImportError:
        return []
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = [argument.name for argument in session.get_inputs()]  # an input that changes nothing is left out

    def run(inputs: dict[str, torch.Tensor]):
        out, out_valid = session.run(None, {name: inputs[name].numpy() for name in taken})
        return torch.from_numpy(out), torch.from_numpy(out_valid)

    return _compared(artifact, run)


def _exported(artifact: Path, any_num_tokens: bool) -> torch.export.ExportedProgram:
    """The masked form with a batch of any size.

    Sizes are stated first; where torch cannot prove them it is asked to infer them, and a batch that it fixes is an error.
    """
    inputs, compressor = _inputs(artifact, "masked"), verify.load(artifact)
    free = {name: {0: "batch"} for name in inputs}
    for name in inputs:
        if name in ("text", "text_valid"):
            free[name][1] = "text"
        elif any_num_tokens:
            free[name][1] = "tokens"
    stated = {size: torch.export.Dim(size, min=1, max=65536) for size in ("batch", "tokens", "text")}
    for sizes in (stated, dict.fromkeys(stated, torch.export.Dim.AUTO)):
        shapes = {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in free.items()}
        try:
            program = torch.export.export(compressor, (), inputs, dynamic_shapes=shapes, strict=False)
        except UserError:
            continue
        try:
            program.module()(**{name: value[:1] for name, value in inputs.items()})
        except (RuntimeError, AssertionError):  # either says that a guard failed
            continue
        return program
    raise ValueError(
        "the PyTorch code of this compressor computes with the batch size, and torch.export fixes it; "
        "the artifact and jax-export hold this compressor."
    )


def _inputs(artifact: Path, case: str) -> dict[str, torch.Tensor]:
    """The twin's arguments in this golden case, all of them real where the case has no mask; in the twin's order."""
    golden = load_file(artifact / "golden.safetensors")
    found = {name: golden[f"{case}.{name}"] for name in ("tokens", *verify.INPUTS) if f"{case}.{name}" in golden}
    found.setdefault("valid", torch.ones(found["tokens"].shape[:2], dtype=torch.bool))
    order = inspect.signature(verify.load(artifact).forward).parameters
    return {name: found[name] for name in order if name in found}


def _compared(artifact: Path, run) -> list[dict]:
    golden = load_file(artifact / "golden.safetensors")
    cases = sorted(name.removesuffix(".tokens") for name in golden if name.endswith(".tokens"))
    rows = []
    for case in cases:
        with torch.inference_mode():
            out, out_valid = run(_inputs(artifact, case))
        expected, expected_valid = golden[f"{case}.out"], golden.get(f"{case}.out_valid")
        if out.shape != expected.shape:
            raise ValueError(f"{case}: the graph answers {list(out.shape)}, JAX {list(expected.shape)}.")
        if expected_valid is not None and not torch.equal(out_valid, expected_valid):
            raise ValueError(f"{case}: other outputs of the graph are valid than in JAX.")
        apart = (out - expected).abs().max().item()
        relative = apart / max(expected.abs().max().item(), torch.finfo(torch.float32).tiny)
        if not relative <= verify.TOLERANCE:
            raise ValueError(f"{case}: the graph is off by {relative:.1e} of the largest output; nothing is exported.")
        rows.append({"case": case, "tokens": list(_inputs(artifact, case)["tokens"].shape), "relative": relative})
    return rows
