# Every target first makes sure that .venv exists and holds what it needs: `make demo` installs what
# it runs and no more, the others add their extras of pyproject.toml.
# PYTHON=python3.12 make test     picks another interpreter for a new .venv

PYTHON ?= python3
BIN := .venv/bin
DEMO := .demo/tiny-opt
INSTALL = $(BIN)/python -m pip install -c constraints.txt -e
# Alone: graphs of ours need none of the converters that it asks for; the extra `test` has the rest.
MODEL_EXPLORER = $(BIN)/python -m pip install -c constraints.txt --no-deps ai-edge-model-explorer

# glibc keeps memory that was freed: giving it back and taking it anew was a tenth of the tests.
TEST = MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 $(BIN)/pytest -n 2

.DEFAULT_GOAL := help
FUZZ := 1
.PHONY: help demo test test-slow fuzz check docs web check-web clean
# node and npm of the system, or of the extra `web` (`make .venv/.installed-web` installs it).
NODE_PATHS = PATH="$(PATH):$(abspath $(BIN))"

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/.installed ## compile the bundled model, inspect it, run it on a paragraph
	$(BIN)/tintc compile tiny-opt -o $(DEMO) --force
	$(BIN)/tintc inspect $(DEMO)
	$(BIN)/tintc run $(DEMO) --file examples/paragraph.txt

test: .venv/.installed-test ## run the tests: every kind of check, on samples of the large grids; fuzz has its own
	$(TEST) --dist loadgroup --ignore=tests/fuzz

test-slow: .venv/.installed-test ## run the rest: the full grids, large models
	$(TEST) --dist loadgroup -m slow

fuzz: .venv/.installed-test ## spoil artifacts and kill commands at random, at most 10 minutes; FUZZ=10 for longer
	$(TEST) tests/fuzz --fuzz $(FUZZ)

check: .venv/.installed-check ## ruff (lint and format), import-linter and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: .venv/.installed-docs ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html

web: ## build the page's browser half into page/static, which is checked in; needs node
	cd web && $(NODE_PATHS) npm ci --no-audit --no-fund && $(NODE_PATHS) npm run build

check-web: ## build it into a temporary folder and compare
	cd web && $(NODE_PATHS) npm ci --no-audit --no-fund
	cd web && out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
		$(NODE_PATHS) TINTC_WEB_OUT="$$out" npm run build && \
		$(NODE_PATHS) npm run compare -- "$$out" ../page/static

clean: ## remove build outputs, caches and the demo; .venv stays
	rm -rf build dist tintc.egg-info .demo docs/_build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find ir passes runtime compiler evaluate page tintc tests examples docs \
		-name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tintc needs Python 3.11 or newer; '$(PYTHON)' is older or missing." \
			"Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[test]"
	$(MODEL_EXPLORER)
	@touch $@ .venv/.installed

.venv/.installed-check: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[test,check]"
	$(MODEL_EXPLORER)
	@touch $@ .venv/.installed .venv/.installed-test

.venv/.installed-web: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[web]"
	@touch $@ .venv/.installed

.venv/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[docs]"
	@touch $@ .venv/.installed
