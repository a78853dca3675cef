# Three commands, nothing to install first: each makes .venv from the pinned requirements if it is missing or out of date.

VENV ?= .venv
# The pins were made with 3.11, so that comes first; a pyenv stub or a Python without venv is passed over.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
  $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)
BIN := $(VENV)/bin
# Huge pages for large blocks (glibc 2.35 or newer): XLA's CPU buffers are mapped anew at every step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help ablate test lint format pins clean

help:  ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

ablate: $(VENV)/core.stamp  ## prepare the digit boards, run the study num_queries, write its report
	$(BIN)/tcjax data prepare data/digit_boards
	$(BIN)/tcjax ablate experiments/num_queries
	$(BIN)/tcjax report runs/num_queries

test: $(VENV)/dev.stamp  ## every test, the slow ones too, one worker per core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(VENV)/dev.stamp  ## formatting, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp  ## rewrite the files the way `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pins:  ## resolve pyproject.toml anew and rewrite requirements/*.txt
	bash requirements/pin "$(PYTHON)"

clean:  ## remove the environment and every cache; data and runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python.stamp:
	@"$(PYTHON)" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "tcjax needs Python 3.11 or newer with venv, found PYTHON='$(PYTHON)'; say which one: make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/core.stamp: requirements/core.txt pyproject.toml $(VENV)/python.stamp
	$(INSTALL) -r requirements/core.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/core.stamp
	$(INSTALL) -r requirements/dev.txt
	@touch $@
