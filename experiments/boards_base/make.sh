#!/usr/bin/env bash
# Retrains the embedded base, stage by stage, and exports it into configs/boards_base. Resumes where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
tcjax() { "${PYTHON:-.venv/bin/python}" -m tcjax.cli "$@"; }

tcjax data prepare data/digit_boards
tcjax data prepare data/digit_grids
tcjax train configs/boards_base.py:tower
tcjax export runs/boards_base/tower --to parts --out configs/boards_base
tcjax train configs/boards_base.py:short
tcjax export runs/boards_base/short --to parts --out runs/boards_base/short/parts
tcjax train configs/boards_base.py:llm
tcjax export runs/boards_base/llm --to parts --out configs/boards_base
tcjax evaluate runs/boards_base/llm --json > experiments/boards_base/scores.json
