"""The verbs that take weights away and bring them in: export and import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from tcjax.arguments import pair, parse

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Export:
    """Take the trained weights away.

    to: "artifact" is a folder that needs only torch and safetensors, with its parity certificate; "parts" is every
    trained part as safetensors (tower and LLM under their published names); "llm" is the trained LLM as a published
    checkpoint's folder, LoRA merged; hf, hf-remote, llava, onnx, torch-export, jax-export are other people's formats.
    targets: say which of them hold this run's compressor, and why the others do not; nothing is written.
    json: print that list as JSON.
    """

    run: Positional[Path]
    out: Path | None = None
    to: str = "artifact"
    targets: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make an artifact of a published PyTorch connector, to start training from (train.weights) or to measure.

    source: checkpoint, a folder or a .safetensors, .bin or .pt file; its layout is known by its names.
    grid: the tower's tokens, "24x24", if config.json does not say them. llm_width: if the checkpoint has no layer to an LLM.
    queries: of a compressor whose weights do not know it. family: which one is meant, if several layouts fit.
    seed: of what the checkpoint does not hold.
    """

    source: Positional[Path]
    out: Path
    grid: str = ""
    llm_width: int = 0
    queries: int = 0
    family: str = ""
    seed: int = 0


def export_weights(arguments: list[str]) -> int:
    asked = parse(Export, arguments)

    from tcjax import content
    from tcjax.export.run import TARGETS, export_run
    from tcjax.job import load_run, trained
    from tcjax.study import rows
    from tcjax.study.tables import target_table

    if asked.to not in TARGETS:
        raise ValueError(f"--to {asked.to!r} is unknown; choose one of {', '.join(TARGETS)}.")
    run, root = load_run(asked.run), content.project_root(asked.run)
    if asked.targets:
        target_table(run, as_json=asked.json)
        return 0
    if asked.out is None:
        raise ValueError("--out DIR says where the export goes; `--targets` only lists what it can be.")
    model, identity, _ = trained(run, root=root, out=asked.run, frozen="float32")
    study, _ = rows.read(asked.run.resolve().parent)
    print(export_run(asked.to, run, model, identity, out=asked.out, root=root, rows=study))
    return 0


def import_weights(arguments: list[str]) -> int:
    asked = parse(Import, arguments)

    from tcjax.export.warm_start import import_artifact

    grid_HW = pair(asked.grid, "--grid") if asked.grid else None
    found = import_artifact(
        asked.source,
        asked.out,
        grid_HW=grid_HW,
        llm_D=asked.llm_width,
        num_queries=asked.queries,
        family=asked.family,
        seed=asked.seed,
    )
    print(f"{asked.out}: {found.publisher}, {found.share:.2%} of the parameters from the file; {found.config}")
    if found.fresh:
        print(f"not in the file, so new from seed {asked.seed}: {', '.join(found.fresh)}")
    return 0
