# make demo: compresses a vision transformer trained on real images.  make test: the test suite.
# Both set themselves up in .venv; they need python3 (3.11 or newer), git and make.

PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/digits
SEED ?= 0

.PHONY: setup demo test faults

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt \
		--requirement requirements.txt --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python -m flora_jax.main --config=configs/digits.py --workdir=$(WORKDIR) --config.seed=$(SEED)

# Twenty kills, damaged and half-written files, a full disk, a lost process: many minutes.
faults: setup
	timeout 3600 $(BIN)/python -m pytest tests/test_faults.py tests/test_processes.py tests/test_bucket.py -m ""

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder
