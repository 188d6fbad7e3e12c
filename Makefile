# Everything a checkout can do. A fresh machine needs Python >= 3.11 and make; the rest is set up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := build
# Compilers for TPUs and GPUs, in a folder of their own: JAX would look for their hardware. The TPU
# compiler is pinned: `make tpu-static` compares its instructions, which change with every release.
AOT := $(CURDIR)/$(VENV)/aot
WITH_AOT := JAX_PLATFORMS=cpu PYTHONPATH=$(AOT)
# Two processes by default: the tests are made for two cores.
WORKERS ?= 2
TESTS ?= tests

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-all golden lint format types docs docs-serve readme notebooks bench wheel dev clean \
  aot portability tpu-static gpu-smoke

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Stamps make the second call quick: pip runs again only when pyproject.toml has changed.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "attnjax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train-stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.train-stamp

dev: $(VENV)/.dev-stamp  ## Set up .venv with everything for development

train: $(VENV)/.train-stamp  ## Train the demo model on real text (<= 5 minutes on 2 cores); resumes
	$(BIN)/python -m train run demo $(ARGS)

test: $(VENV)/.dev-stamp  ## Run the default tests (<= 20 minutes on 2 cores)
	$(WITH_AOT) $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

test-all: $(VENV)/.dev-stamp  ## Run all tests, the slow and the exhaustive ones too
	$(WITH_AOT) $(BIN)/python -m pytest -n $(WORKERS) -m "" $(TESTS)

test-slow: $(VENV)/.dev-stamp  ## Run the tests that take long, among them trainings to the end
	$(WITH_AOT) $(BIN)/python -m pytest -n $(WORKERS) -m slow $(TESTS)

golden: $(VENV)/.dev-stamp  ## Compare with official implementations and record the errors
	$(WITH_AOT) $(BIN)/python -m tests.golden.record -n $(WORKERS)

lint: $(VENV)/.dev-stamp  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify colab/*.ipynb

format: $(VENV)/.dev-stamp  ## Mend what the formatter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout colab/*.ipynb

types: $(VENV)/.dev-stamp  ## Check types
	$(BIN)/pyright

docs: $(VENV)/.dev-stamp  ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.dev-stamp  ## Serve the documentation while writing it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

readme: $(VENV)/.dev-stamp  ## Write the table of mechanisms and the pictures of README.md anew
	$(BIN)/python -m docs.tools.readme

notebooks: $(VENV)/.dev-stamp  ## Execute all notebooks into build/notebooks
	$(BIN)/python colab/execute.py colab/*.ipynb --out $(OUT)/notebooks

bench: $(VENV)/.dev-stamp  ## Measure against peers; results in build/benchmarks
	$(BIN)/python -m benchmarks attention --out $(OUT)/benchmarks
	$(BIN)/python -m benchmarks memory --out $(OUT)/benchmarks
	$(BIN)/python -m benchmarks lightning --out $(OUT)/benchmarks

$(AOT)/.stamp: $(VENV)/.dev-stamp
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(AOT) 'libtpu==0.0.51' \
	  $$($(BIN)/python -c 'import jax; print(*(f"jax-cuda13-{p}=={jax.__version__}" for p in ("plugin", "pjrt")))')
	@touch $@

aot: $(AOT)/.stamp  ## Set up the compilers for TPUs and GPUs (1 GB); the tests then use them too

portability: $(AOT)/.stamp  ## Compile every kernel for every TPU and GPU, none of them needed
	$(WITH_AOT) $(BIN)/python -m benchmarks portability --out $(OUT)/benchmarks $(ARGS)

tpu-static: $(AOT)/.stamp  ## Scheduled instructions of the TPU kernels beside splash attention's
	$(WITH_AOT) $(BIN)/python -m benchmarks tpu-static --out $(OUT)/benchmarks $(ARGS)

gpu-smoke: $(VENV)/.dev-stamp  ## Run the GPU benchmark with tiny sizes on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks gpu --smoke --out $(OUT)/benchmarks

wheel: $(VENV)/.dev-stamp  ## Build the wheel and try it outside the checkout
	rm -rf dist $(OUT)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target $(OUT)/wheel dist/attnjax-*.whl
	cd $(OUT)/wheel && PYTHONPATH=. $(CURDIR)/$(BIN)/python $(CURDIR)/tests/installed_wheel.py $(CURDIR)/dist

clean:  ## Remove what was built, but not .venv and runs/
	rm -rf $(OUT) dist site
