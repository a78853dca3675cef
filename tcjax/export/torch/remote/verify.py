"""Check a Hugging Face directory: are the files whole, does every weight find its place, does it compute what JAX did?

    python verify.py [folder] [--json]          exit code 0 if everything holds, 1 if not

Needs torch, transformers and safetensors; executes the directory's own code (trust_remote_code) if it has any. In order:
    hashes      every file is the one the manifest was written with (nothing is executed before that is known)
    load        no tensor missing, unexpected or misshapen; no buffer that is not finite
    logits      all positions of two prompts, within 1e-5 of the largest logit
    generate    the greedy answer, token by token
    processor   the prompt's ids (exactly Q placeholders per image), the question's own, and the pixels
Of a language model alone the first three; one whose weights are stored in 16 bits was rounded, so that its logits may be off
by 5e-2.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5
ROUNDED = 5e-2


def check(folder: Path, *, hashes: bool = True) -> dict:
    """{"problems": [lines], "relative": of the logits, "torch": version, "transformers": version}."""
    report: dict = {"problems": changed_files(folder) if hashes else []}
    if report["problems"]:
        return report
    import transformers

    report |= {"torch": torch.__version__, "transformers": transformers.__version__}
    golden = load_file(folder / "golden.safetensors")
    config = json.loads((folder / "config.json").read_text())
    remote, alone = "auto_map" in config, config["architectures"][0].endswith("ForCausalLM")
    auto = transformers.AutoModelForCausalLM if alone else transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(
        folder,
        trust_remote_code=remote,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below; without it the error names none
        dtype=torch.float32,
    )
    report["class"] = type(model).__name__
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        report["problems"] += [f"load: {kind.replace('_', ' ')}: {key}" for key in sorted(map(str, info[kind]))]
    state = [*model.named_parameters(), *model.named_buffers()]
    report["problems"] += [
        f"load: {name} is not finite"
        for name, value in state
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if report["problems"]:
        return report
    images = {} if alone else inputs_of(golden, config)
    report["tolerance"] = TOLERANCE if config["dtype"] == "float32" else ROUNDED
    report["problems"] += same_logits(model.eval(), golden, images, report)
    if alone:
        return report
    report["problems"] += same_answer(model, golden, images)
    report["problems"] += same_inputs(folder, golden, remote)
    return report


def inputs_of(golden: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    pixels = golden["pixel_values"]
    if config["model_type"] == "instructblip":
        return {"pixel_values": pixels, "qformer_input_ids": golden["question_ids"]}
    return {"pixel_values": pixels[:, None] if config["model_type"].startswith("idefics") else pixels}


def same_logits(model: torch.nn.Module, golden: dict[str, torch.Tensor], images: dict, report: dict) -> list[str]:
    with torch.inference_mode():
        logits = model(input_ids=golden["input_ids"], **images).logits
    expected = golden["logits"]
    if logits.shape != expected.shape:
        return [f"logits: {list(logits.shape)}, JAX gave {list(expected.shape)}"]
    report["relative"] = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not report["relative"] <= report["tolerance"]:
        return [f"logits: off by {report['relative']:.1e} of the largest, at most {report['tolerance']:.0e} is right"]
    return []


def same_answer(model: torch.nn.Module, golden: dict[str, torch.Tensor], images: dict) -> list[str]:
    expected, prompt = golden["generated"], golden["input_ids"]
    said = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=expected.shape[1],
        do_sample=False,
        **images,
    )
    said = said[:, prompt.shape[1] :] if said.shape[1] > expected.shape[1] else said
    end = model.generation_config.eos_token_id
    for row, (ours, theirs) in enumerate(zip(cut(said, end), cut(expected, end), strict=True)):
        if ours != theirs:
            return [f"generate: answer {row} is {ours}, JAX said {theirs}"]
    return []


def cut(rows: torch.Tensor, end: int | list[int]) -> list[list[int]]:
    """Each row up to its end mark, one id or any of several."""
    ends = end if isinstance(end, list) else [end]
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows.tolist()]


def same_inputs(folder: Path, golden: dict[str, torch.Tensor], remote: bool) -> list[str]:
    import transformers
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=remote)
    prompt = bytes(golden["prompt"].tolist()).decode()
    images = [Image.fromarray(image) for image in golden["image"].numpy()]
    found = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    problems = []
    if not torch.equal(found["input_ids"], golden["input_ids"]):
        problems.append(f"processor: ids {found['input_ids'][0].tolist()}, expected {golden['input_ids'][0].tolist()}")
    question = processor.tokenizer(bytes(golden["question"].tolist()).decode(), add_special_tokens=False)["input_ids"]
    if question != golden["question_ids"][0].tolist():
        problems.append(f"processor: the question's ids {question}, expected {golden['question_ids'][0].tolist()}")
    pixels = found["pixel_values"].reshape(golden["pixel_values"].shape)
    if not np.allclose(pixels.numpy(), golden["pixel_values"].numpy(), atol=1e-5):
        problems.append("processor: other pixels than in training")
    return problems


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Check an exported Hugging Face directory.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--json", action="store_true", help="print the report for a machine")
    parser.add_argument("--no-hashes", action="store_true", help="there is no manifest yet")
    arguments = parser.parse_args()
    report = check(arguments.folder, hashes=not arguments.no_hashes)
    lines = [*report["problems"], "everything holds" if not report["problems"] else "NOT what was exported"]
    print(json.dumps(report, indent=1) if arguments.json else "\n".join([f"logits: {report.get('relative')}", *lines]))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
