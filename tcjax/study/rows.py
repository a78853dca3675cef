"""rows.jsonl: what a study measured, one JSON object per line; the last line of a fingerprint wins.

A row is {
    run, compressor, num_queries, seed            who: folder below the study, name of the family, Q asked for
    visual_tokens, ratio                          Q that the LLM gets, N / Q
    accuracy {task: {mean, low, high, n}}         exact match; token_accuracy, chance {task: float}
    controls {"blank": {task: {...}}, ...}        accuracy without the image, or with another one
    mean_accuracy                                 over all tasks but the caption
    prefill_flops, kv_bytes, prefill_seconds      of one image with its question; FLOPs = 2 * MACs, tower included
    train_seconds, steps, converged               converged: bool, or null if it cannot be said
    fingerprint, commit, hardware, date, command, artifact
}
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"
REQUIRED = ("run", "compressor", "seed", "visual_tokens", "ratio", "accuracy", "fingerprint")

Row = dict[str, Any]


def append(study: Path, row: Row) -> None:
    """Add a row durably: one write to the end of the file, under a lock that other hosts of a cluster see too.

    Neither a kill nor a second writer tears an older row; runs of one study may end at the same moment.
    """
    lacking = [key for key in REQUIRED if row.get(key) is None]
    if lacking:
        raise ValueError(f"a row lacks {lacking}; every row needs {list(REQUIRED)}.")
    try:
        line = json.dumps(row, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(
            f"row {row['run']!r} holds NaN or infinity, which JSON does not have; store null instead."
        ) from error
    study.mkdir(parents=True, exist_ok=True)
    file = os.open(study / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)  # an NFS client knows the end of a file only under a lock; closing lets it go
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = "\n" + line  # the last writer was killed: what it left is one broken line, not ours
        written = os.write(file, line.encode())
        assert written == len(line.encode()), "a regular file takes a short write whole"
        os.fsync(file)
    finally:
        os.close(file)


def read(study: Path) -> tuple[list[Row], list[str]]:
    """The last row of each fingerprint, in the order they were written, and a warning per line that is no row."""
    path = study / FILE
    by_fingerprint: dict[str, Row] = {}
    warnings = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            warnings.append(f"{FILE} line {number} is broken (a writer was stopped halfway?) and was left out.")
            continue
        lacking = [key for key in REQUIRED if not isinstance(row, dict) or row.get(key) is None]
        if lacking:
            warnings.append(f"{FILE} line {number} lacks {', '.join(lacking)} and was left out.")
            continue
        by_fingerprint.pop(row["fingerprint"], None)
        by_fingerprint[row["fingerprint"]] = row
    return list(by_fingerprint.values()), warnings


def read_for_report(study: Path) -> tuple[list[Row], list[str]]:
    """`read`, one row per run: a run that was repeated with another config has overwritten its own folder.

    Raises:
        ValueError: there is not a single row to report on.
    """
    rows, warnings = read(study)
    if not rows:
        raise ValueError(
            f"{study / FILE} holds no rows: run the study first (tcjax ablate experiments/{study.name}), or name the "
            f"folder it wrote to. {' '.join(warnings)}".rstrip()
        )
    by_run = {row["run"]: row for row in rows}
    if older := len(rows) - len(by_run):
        warnings.append(f"{older} older row(s) of runs that were repeated with another config were left out.")
    return list(by_run.values()), warnings
