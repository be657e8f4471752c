# Everything runs from .venv, which is made from pyproject.toml and requirements.lock and made again when they change.
#   make quickstart   train, merge, reload and compare an adapter on real images
#   make test         the test suite, without the tests that are marked slow
#   make test-slow    those
#   make lint         style, format, types and the order of the packages
#   make docs         run the code of the README and of docs/
#   make docs-site    make the documentation a site in site/; a warning is an error
#   make lock         write requirements.lock anew (LOCK_ARGS=--upgrade takes newer versions)

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

# Not in requirements.lock, since their builds differ by machine. `make lock` after a change.
TORCH := 2.13.0
TORCHVISION := 0.28.0

# The first Python that is new enough and can make virtual environments; choose another with PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One thread per worker: the workers share the processors.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

.PHONY: quickstart test test-slow lint docs docs-site setup lock clean

setup: $(READY)

# torch comes first and by exact version, so that a build that is at hand locally is taken; torchvision then fits it.
$(READY): pyproject.toml requirements.lock setup.py
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python >= 3.11 with the modules venv and ensurepip was found. Install one (Debian: python3 and" \
			"python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "== setting up $(VENV) with $(PYTHON) (some minutes the first time)"
	@rm -f $(READY)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "== torch"
	@$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	@$(BIN)/python -m pip install --quiet --no-deps "torchvision==$(TORCHVISION)"
	@echo "== the other packages"
	@$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(READY)

quickstart: $(READY)
	@$(BIN)/vispeft quickstart

test: $(READY)
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)
	@$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/docs

docs-site: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

lock:
	@PYTHON=$(PYTHON) .ci/lock $(TORCH) $(TORCHVISION) $(LOCK_ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
