# `make demo` shows a result, `make test` checks everything; both start from Python, git and make alone.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PAGE ?= story/inspect.html
PICTURE ?= story/inspect.png
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
HOUSE := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo story test check lint types layers docs docs-help pytest format bench picture clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

demo: $(VENV)/.train ## train the shipped model on new facts at two ranks under two rules; a page into story/demo/
	$(BIN)/rankwise demo -o story/demo --force

story: $(VENV)/.core ## train a small adapter, inspect it, simulate, and write two pages into story/
	$(BIN)/python docs/examples/make_adapter.py story/style-and-facts
	$(BIN)/rankwise inspect story/style-and-facts --out story/inspect.json --report story/inspect.html --force
	$(BIN)/rankwise simulate --out story/simulate.json --report story/simulate.html --force
	@echo "Open story/inspect.html and story/simulate.html in a browser."

test: $(VENV)/.full ## install everything that the tests need and run all checks
	@$(MAKE) --no-print-directory check

check: lint types layers docs pytest ## all checks, in an environment that is already there

lint: ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy tests/typing/api.py docs/examples docs/tools

layers: ## who may import whom
	$(BIN)/lint-imports

docs: ## build the documentation; any warning or dead link between pages fails
	$(BIN)/sphinx-build --fail-on-warning --keep-going -q -E -b html docs docs/_build/html

docs-help: ## rewrite the --help texts in the docs
	$(BIN)/python docs/tools/write_help.py

pytest: ## all tests and doctests
	$(BIN)/pytest -n $(JOBS)

format: ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.full ## ratios against peers, measured in one run (slow)
	$(PIP) -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/run.py

picture: ## photograph the page PAGE into PICTURE (needs Chromium)
	$(BIN)/python docs/tools/picture.py $(PAGE) $(PICTURE)

clean: ## remove environments and build outputs
	rm -rf .venv story dist docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Editable installs: a change in src needs no new install, a change of the pins does.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(HOUSE) | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.train: $(HOUSE) | $(VENV)/bin/python
	$(PIP) -e '.[train]'
	@touch $@ $(VENV)/.core

$(VENV)/.full: $(HOUSE) | $(VENV)/bin/python
	$(PIP) -e '.[all]'
	@touch $@ $(VENV)/.core $(VENV)/.train
