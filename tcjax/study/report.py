"""`report(runs/<study>)`: from the rows and the runs' own files to report.html, report.md and the plots.

Reads rows.jsonl, and of every run metrics.jsonl (curves), answers.jsonl (paired differences) and looks.npz (where the
queries look). Nothing is inferred from a path's name; what a killed run left half-written is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tcjax.study import curves, looks, paired, plots
from tcjax.study.html import Picture, html
from tcjax.study.lints import lints
from tcjax.study.markdown import markdown
from tcjax.study.ranking import ranking
from tcjax.study.rows import Row, read_for_report
from tcjax.study.words import headline


def report(study: Path) -> dict[str, Path]:
    """Write the report of a study's folder.

    Returns:
        {"html", "markdown", and a name per plot: path}, all below `study`.

    Raises:
        ValueError: the folder has no rows.
    """
    study = Path(study)
    rows, warnings = read_for_report(study)
    title = f"{study.resolve().name}: accuracy against visual tokens"
    verdicts = {row["run"]: paired.read(study / row["run"]) for row in rows}
    sentences, warnings = headline(rows, verdicts), [*lints(rows), *warnings]
    written: dict[str, Path] = {
        "accuracy": (ranking if plots.crowded(rows) else plots.accuracy)(rows, study / "plots" / "accuracy.png")
    }
    drawn = [Picture(written["accuracy"], "Exact match per task against the visual tokens the LLM gets.")]
    if path := plots.cost(rows, study / "plots" / "cost.png"):
        written["cost"] = path
        drawn.append(
            Picture(
                path, "Mean accuracy against prefill FLOPs and against KV cache, with the numbers of visual tokens."
            )
        )
    metrics = {row["run"]: _metrics(study / row["run"] / "metrics.jsonl") for row in rows}
    if path := curves.training(rows, metrics, study / "plots" / "training.png"):
        written["training"] = path
        drawn.append(
            Picture(path, "Training loss; dashed and ⚠: not converged, twice the steps would have lowered it further.")
        )
    seen = _looks(study, rows)
    written |= {picture.path.stem: picture.path for picture in seen}
    written["html"] = _write(study / "report.html", html(title, rows, sentences, warnings, drawn, seen))
    written["markdown"] = _write(study / "report.md", markdown(title, rows, sentences, warnings))
    return written


def _looks(study: Path, rows: list[Row]) -> list[Picture]:
    """One picture per (compressor, Q) that compresses: of its first seed."""
    pictures: dict[tuple[str, int], Picture] = {}
    for row in rows:
        family, Q = row["compressor"], row["visual_tokens"]
        held = looks.read(study / row["run"]) if (family, Q) not in pictures else None
        if held is None or row["ratio"] == 1:  # one query per patch: the picture would be a grid
            continue
        path = looks.draw(held, f"{family}, {Q} tokens", study / "plots" / f"looks-{family}-{Q}.png")
        pictures[family, Q] = Picture(path, f"{family} at {Q} tokens, seed {row['seed']}.")
    return list(pictures.values())


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics.jsonl that say step and loss."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if {"step", "loss"} <= line.keys():
            lines.append(line)
    return lines


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
