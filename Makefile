# Every target first makes sure that .venv exists and holds what pyproject.toml asks for.
# PYTHON=python3.12 make test     picks another interpreter for a new .venv

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := .demo/tiny-opt

.DEFAULT_GOAL := help
.PHONY: help demo test check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED) ## compile the bundled model, inspect it, run it on a paragraph
	$(BIN)/tintc compile tiny-opt -o $(DEMO) --force
	$(BIN)/tintc inspect $(DEMO)
	$(BIN)/tintc run $(DEMO) --file examples/paragraph.txt

test: $(INSTALLED) ## run the tests
	$(BIN)/pytest -n 2

check: $(INSTALLED) ## ruff (lint and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove build outputs, caches and the demo; .venv stays
	rm -rf build dist tintc.egg-info .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find compiler passes runtime tintc tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tintc needs Python 3.11 or newer; '$(PYTHON)' is older or missing. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	@touch $@
