# make demo: compresses a vision transformer trained on real images.  make test: the test suite.
# make check: what to run before every commit, some minutes.
# All set themselves up in .venv; they need python3 (3.11 or newer), git and make. PYTHON=python3.13
# VENV=.venv-3.13 is another Python beside it, with the newer JAX that constraints.txt has for it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits
SEED ?= 0
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: setup constraints demo docs lint check test faults

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The newest versions inside the ranges of requirements.txt and pyproject.toml, each for the Pythons
# that it runs on: 3.11 ends at jax 0.10.2. Run the tests on both after.
constraints: setup
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
		--no-annotate --no-emit-index-url --custom-compile-command "make constraints" \
		--output-file constraints.txt

demo: setup
	$(BIN)/python -m flora_jax.main --config=configs/digits.py --workdir=$(WORKDIR) --config.seed=$(SEED)

# The site, in site/; a broken link or an unknown name is an error.
docs: setup
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs site

# Style, types, and which rooms may know which.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint docs
	$(PYTEST) -m "not slow and not processes and not faults"

test: lint
	$(PYTEST)

# Twenty kills, damaged and half-written files, a full disk, a lost process, all benchmarks: many
# minutes.
faults: setup
	timeout 3600 $(BIN)/python -m pytest tests/test_faults.py tests/test_processes.py \
		tests/test_bucket.py tests/test_benchmarks.py -m ""
