# make demo: compresses a vision transformer trained on real images.  make test: the test suite.
# make check: what to run before every commit, under two minutes.
# All set themselves up in .venv; they need python3 (3.11 or newer), git and make.

PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/digits
SEED ?= 0
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: setup demo lint check test faults

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt \
		--requirement requirements.txt --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python -m flora_jax.main --config=configs/digits.py --workdir=$(WORKDIR) --config.seed=$(SEED)

# Style, types, and which rooms may know which.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint
	$(PYTEST) -m "not slow and not processes and not faults"

test: lint
	$(PYTEST)

# Twenty kills, damaged and half-written files, a full disk, a lost process: many minutes.
faults: setup
	timeout 3600 $(BIN)/python -m pytest tests/test_faults.py tests/test_processes.py tests/test_bucket.py -m ""
