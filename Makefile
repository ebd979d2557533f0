# `make demo` and `make test` each do everything: create .venv, install the pinned dependencies, run.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Waiting OpenMP threads must sleep, not spin: a busy neighbour would otherwise slow a step many times over.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test lint docs clean
demo: $(VENV)/.installed
	$(BIN)/python -m examples.demo

# In two processes: most tests use one core.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/pip install -q -r requirements-docs.txt
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html

# torch first and by its exact version: a range would bring the CUDA build and gigabytes with it.
$(VENV)/.installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache docs/_build
