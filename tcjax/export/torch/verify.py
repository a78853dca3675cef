"""Check an artifact with PyTorch alone: are the files whole, do the weights fit, does it compute what JAX did?

    python verify.py [folder] [--json]          exit code 0 if everything holds, 1 if not

Needs torch and safetensors. In this order, stopping at the first kind of problem:
    hashes    every file is the one the manifest was written with (nothing is executed before that is known)
    load      `load_state_dict` strictly: no tensor missing, unexpected or misshapen, all of them finite
    parity    golden.safetensors holds inputs, masks and the outputs of the trained JAX compressor (float32, highest
              matmul precision); this code's outputs differ by at most 1e-5 of the largest output
"""

import argparse
import hashlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

INPUTS = ("valid", "text", "text_valid", "levels", "prior")  # what a compressor may take beside the tokens
TOLERANCE = 1e-5  # float32 on both sides measures 1e-7 ... 2e-6


def check(folder: Path, *, hashes: bool = True) -> dict:
    """{"problems": [lines], "cases": [{case, tokens, out, max_abs, relative, cosine}], "torch": version}."""
    report: dict = {"problems": changed_files(folder) if hashes else [], "cases": [], "torch": torch.__version__}
    if report["problems"]:
        return report
    try:
        compressor = load(folder)
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        report["problems"] = [f"load: {error}"]
        return report
    report["problems"] = [
        f"load: {name} is not finite" for name, value in compressor.state_dict().items() if not value.isfinite().all()
    ]
    if not report["problems"]:
        golden = load_file(folder / "golden.safetensors")
        report["cases"] = [
            compare(compressor, golden, name.removesuffix(".tokens"))
            for name in sorted(golden)
            if name.endswith(".tokens")
        ]
        report["problems"] = [f"parity: {row['case']}: {row['problem']}" for row in report["cases"] if row["problem"]]
        if not report["cases"]:
            report["problems"] = ["parity: golden.safetensors holds no case"]
    return report


def changed_files(folder: Path) -> list[str]:
    """One line per file that is missing or not the one of the manifest."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return [f"hashes: {manifest} is missing"]
    problems = []
    for name, expected in json.loads(manifest.read_text())["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"hashes: {name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            problems.append(f"hashes: {name} is not the file the manifest was written with")
    return problems


def load(folder: Path) -> torch.nn.Module:
    """The artifact's own class with the artifact's own weights, in float32."""
    path = folder / "modeling_compressor.py"
    modeling = types.ModuleType("modeling_compressor")  # by hand: an import would leave bytecode in the folder
    exec(compile(path.read_text(), str(path), "exec"), modeling.__dict__)
    compressor = modeling.Compressor(json.loads((folder / "compressor_config.json").read_text()))
    compressor.load_state_dict(load_file(folder / "compressor.safetensors"), strict=True)
    return compressor.eval()


def compare(compressor: torch.nn.Module, golden: dict[str, torch.Tensor], case: str) -> dict:
    """One golden case: how far are we from the shipped outputs?"""
    tokens, expected = golden[f"{case}.tokens"], golden[f"{case}.out"]
    row = {"case": case, "tokens": list(tokens.shape), "out": list(expected.shape), "problem": ""}
    inputs = {name: golden[f"{case}.{name}"] for name in INPUTS if f"{case}.{name}" in golden}
    expected_valid = golden.get(f"{case}.out_valid")
    try:
        with torch.inference_mode():
            out = compressor(tokens, **inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        return row | {"problem": str(error)}
    if "valid" in inputs:
        out, out_valid = out
        if expected_valid is None or not torch.equal(out_valid, expected_valid):
            return row | {"problem": "other outputs are valid than in JAX"}
    if out.shape != expected.shape:
        return row | {"problem": f"output is {list(out.shape)}, JAX gave {list(expected.shape)}"}
    if not out.isfinite().all():
        return row | {"problem": "output is not finite"}
    row["max_abs"] = (out - expected).abs().max().item()
    row["relative"] = row["max_abs"] / max(expected.abs().max().item(), torch.finfo(torch.float32).tiny)
    row["cosine"] = torch.cosine_similarity(out.double().flatten(), expected.double().flatten(), dim=0).item()
    if not row["relative"] <= TOLERANCE:
        row["problem"] = f"off by {row['relative']:.1e} of the largest output, at most {TOLERANCE:.0e} is right"
    return row


def table(report: dict) -> str:
    """The report for a person."""
    lines = [f"{'case':<10}{'tokens':<18}{'out':<18}{'max abs':<11}{'relative':<11}cosine"]
    for row in report["cases"]:
        numbers = f"{row['max_abs']:<11.2e}{row['relative']:<11.2e}{row['cosine']:.9f}" if "max_abs" in row else "-"
        lines.append(f"{row['case']:<10}{row['tokens']!s:<18}{row['out']!s:<18}{numbers}")
    verdict = "everything holds" if not report["problems"] else "NOT what was exported"
    return "\n".join([*lines, *report["problems"], verdict])


def main() -> int:
    parser = argparse.ArgumentParser(description="Check an exported compressor with PyTorch alone.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--json", action="store_true", help="print the report for a machine")
    arguments = parser.parse_args()
    report = check(arguments.folder)
    print(json.dumps(report, indent=1) if arguments.json else table(report))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
