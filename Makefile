# Everything runs from .venv, which is made from pyproject.toml and constraints.txt and made again when they change.
#   make quickstart   train, merge, reload and compare an adapter on real images
#   make test         the whole test suite
#   make lint         style, format and types
#   make docs         run the code of the README and of docs/

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := dev,export,mmseg,peft
WORKERS ?= 2

# The first Python that is new enough and can make virtual environments; choose another with PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint docs setup clean

setup: $(READY)

# torch comes first and by exact version, so that a build that is at hand locally is taken; torchvision then fits it.
$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python >= 3.11 with the modules venv and ensurepip was found. Install one (Debian: python3 and" \
			"python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "== setting up $(VENV) with $(PYTHON) (some minutes the first time)"
	@rm -f $(READY)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "== torch"
	@$(BIN)/python -m pip install --quiet -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)" setuptools
	@echo "== the other packages"
	@$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $(READY)

quickstart: $(READY)
	@$(BIN)/vispeft quickstart

# One thread per worker: the workers share the processors.
test: $(READY)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/docs

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
