# e4t: `make` lists the targets. Everything is installed into .venv, which is created on first use.
# Another interpreter:  make demo PYTHON=python3.12      another environment:  VENV=/some/where

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
READY := $(VENV)/.installed
# A pipeline fails if any of its commands fails.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help demo test lint types dist hooks mutants bench mini
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(READY) ## one drawn face in eight new scenes: outputs/demo-grid.png
	@mkdir -p outputs
	$(RUN)/e4t personalize face examples/me.png \
	  "S* as an astronaut" "S* on the beach" "S* in the snow" "S* in the forest" \
	  "S* wearing a crown" "S* wearing a red hat" "a pencil sketch of S*" "an oil painting of S*" \
	  --seed 1 --grid -o outputs | tee outputs/.demo
	@cp "$$(grep -e '-grid.*[.]png$$' outputs/.demo)" outputs/demo-grid.png
	@rm outputs/.demo
	@echo outputs/demo-grid.png

# A test uses one thread, so each core can run a test process.
test: $(READY) ## run the test suite on the CPU, offline (e.g. make test ARGS="-k images -x")
	$(RUN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.linter types ## check style, formatting, spelling and types: ruff, typos, mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/typos

types: $(VENV)/.linter ## check the types of src and domains: mypy --strict
	$(RUN)/mypy

dist: $(VENV)/.linter ## build a wheel and a source archive in dist/
	$(RUN)/python -m build --outdir dist

hooks: $(VENV)/.linter ## run lint and types before each commit: pre-commit
	$(RUN)/pre-commit install

mutants: $(READY) ## check that the tests notice small faults in the method (20 minutes)
	$(RUN)/python -m tests.mutants $(ARGS)

bench: $(READY) ## measure time and memory (Stable Diffusion's size on a GPU, a small model on a CPU)
	$(RUN)/python -m benchmarks $(ARGS)

mini: $(READY) ## draw the images and train the embedded base and its domains (hours; resumable)
	$(RUN)/python -m mini_world $(ARGS)

# The stamp file makes this run once, until pyproject.toml changes.
$(READY): pyproject.toml
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing e4t and what it needs into $(VENV) (once; torch is large) …" >&2
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.linter: $(READY)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
