# Commands for developers and CI. `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/synthetic
DATA ?= data/synthetic
BENCH_OUT ?= bench-out
BENCH_OPTIONS = $(if $(IMAGES),--images $(IMAGES)) $(BENCH)
export OMP_NUM_THREADS ?= 1

.PHONY: help install train test test-fast test-browser test-ranks test-faults test-slurm test-images faults guards bench gpu gpu-nodes speedrun docs lock lint format clean
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
	$(BIN)/distrain launch --nproc $$($(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)') \
		-- train --config configs/synthetic.yaml data.dir=$(DATA) run.dir=$(RUN)

# In an order that suits two at a time (make -j2 --output-sync test).
test: test-ranks test-fast test-slurm test-browser test-faults test-images ## Run all tests, with the short form of the fault tests

test-fast: $(VENV)/installed-dev ## Run the tests that need one process
	$(BIN)/pytest -m "not ranks and not faults and not slurm and not images and not browser" --durations=5

test-browser: $(VENV)/installed-dev ## Test the report in headless Chromium; skips if it is missing
	$(BIN)/pytest -m browser -rs --durations=5

test-ranks: $(VENV)/installed-dev ## Run the tests that start several processes
	$(BIN)/pytest -m "ranks and not faults" --durations=5

test-faults: $(VENV)/installed-dev ## Run the short form of `make faults`
	$(BIN)/pytest -m short --durations=5

test-slurm: $(VENV)/installed-dev ## Test launch/*.sbatch on a real SLURM; skips without root and Debian's packages
	$(BIN)/pytest -m "slurm and not faults" -rs --durations=5

# The image's layers stay in podman's storage (about 6 GiB) and are used again.
test-images: $(VENV)/installed-dev ## Build and run the image, and the pods of k8s/ as containers; skips likewise
	$(BIN)/pytest -m "images and not faults" -rs --durations=5

# Tests that passed with the same code are not run again. PART=kills runs one part.
faults: $(VENV)/installed-dev ## Run all fault tests, up to an hour; resumes after an interruption
	DISTRAIN_FAULTS=$(CURDIR)/.faults $(BIN)/pytest tests$(if $(PART),/faults/test_$(PART).py) -m faults -v -s --durations=10

guards: $(VENV)/installed-dev ## Remove each guard against a fault: its test must fail; writes docs/faults.md
	$(BIN)/python tests/faults/guards.py try
	$(BIN)/python tests/faults/guards.py table

bench: $(VENV)/installed-dev ## Run all benchmarks, into bench-out; IMAGES=FOLDER with train/CLASS/ and test/CLASS/
	$(BIN)/python -m benchmarks reading decoding tutorial training scaling evaluation startup memory accuracy --out $(BENCH_OUT) \
		$(BENCH_OPTIONS)

# DEVICE=cpu tries the same tests on CPUs, as far as they go. PART=bits runs one part: tests/gpu/test_gpu_PART.py.
GPU_TESTS = $(BIN)/pytest --gpu $(or $(DEVICE),cuda) -rs --durations=0

gpu: $(VENV)/installed-dev ## Check everything but PART=recipes on GPUs, and measure: a table, and bench-out/gpu.json
	$(GPU_TESTS) --gpu-out $(BENCH_OUT)/gpu.json \
		tests/gpu$(if $(PART),/test_gpu_$(PART).py, --ignore=tests/gpu/test_gpu_recipes.py)

# Nodes are detected as `distrain launch` does: under srun, in a Kubernetes Job, or by DISTRAIN_NODES, _NODE, _HOST and _PORT.
gpu-nodes: $(VENV)/installed-dev ## The same for several nodes, at the same time on each; WORK=a new folder that all see
	$(GPU_TESTS) --gpu-out $(BENCH_OUT)/gpu-nodes.json --gpu-work $(abspath $(or $(WORK),gpu-nodes)) tests/gpu/test_gpu_nodes.py

speedrun: $(VENV)/installed-dev ## The time to 94 % of CIFAR-10 on a GPU; IMAGES as for bench, RECIPE, TARGET
	$(BIN)/python -m benchmarks accuracy --recipe $(or $(RECIPE),configs/speedrun.yaml) --target $(or $(TARGET),94) \
		--out $(BENCH_OUT)/speedrun $(BENCH_OPTIONS)

docs: $(VENV)/installed-dev ## Write docs/configuration.md from the code
	$(BIN)/python docs/write_configuration.py

lock: $(VENV)/installed-dev ## Update the locked versions of the image, which can read data from s3://, gs:// and hf://
	$(BIN)/uv pip compile pyproject.toml --native-tls --universal --python-version 3.10 --generate-hashes \
		--no-annotate --no-header --upgrade --extra s3 --extra gs --extra hf -o requirements.lock

lint: $(VENV)/installed-dev ## Check style, types and imports between modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv, data and runs
	rm -rf $(VENV) data runs
