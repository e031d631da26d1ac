# The same commands everywhere. Each installs the Python packages that it needs, on a fresh machine without a GPU;
# CONTRIBUTING.md lists programs of the system that some tests need.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PORT ?= 8000
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format docs bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Create .venv with the pinned packages (the others call this)

$(INSTALLED): deploy/setup.sh $(wildcard deploy/requirements/*) pyproject.toml
	@deploy/setup.sh $(VENV)
	@touch $@

demo: setup  ## Serve the embedded lab model with its bundle on PORT (8000)
	@$(BIN)/expertsteer demo --port $(PORT)

test: setup  ## Run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup  ## Formatting, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## Render the parts of docs/ that the code says
	$(BIN)/python -m docs.render

bench: setup  ## Throughput against plain vLLM, as ratios
	$(BIN)/python tests/bench/overhead.py

clean:  ## Remove what the other targets made
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .expertsteer
