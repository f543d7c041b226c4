# For people and for CI alike. `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/synthetic
DATA ?= data/synthetic
export OMP_NUM_THREADS ?= 1

.PHONY: help install train test test-fast test-ranks lint format clean
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "distrain needs Python 3.10 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(VENV)/installed ## Set up .venv

train: $(VENV)/installed ## Train on the embedded data set, on all local GPUs or two CPU processes
	$(BIN)/distrain prepare synthetic --out $(DATA)
	$(BIN)/torchrun --standalone --nproc-per-node $$($(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)') \
		-m distrain train --config configs/synthetic.yaml data.dir=$(DATA) run.dir=$(RUN) run.resume=auto

test: test-fast test-ranks ## All tests

test-fast: $(VENV)/installed-dev ## The tests that need one process
	$(BIN)/pytest -m "not ranks and not faults" --durations=5

test-ranks: $(VENV)/installed-dev ## The tests that start several processes
	$(BIN)/pytest -m ranks --durations=5

lint: $(VENV)/installed-dev ## Style, types, and the arrows of the architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv, data and runs
	rm -rf $(VENV) data runs
