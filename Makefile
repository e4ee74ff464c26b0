# `make demo` shows the whole job on demo data, `make test` runs everything; each does all of its own set-up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint setup clean

demo: setup
	@bash scripts/demo.sh

# One thread in each of the two workers: four threads on two cores mostly wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@echo "installing pinned dependencies into .venv (about 6 GB with torch's CUDA libraries)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv data/demo data/demo-shards runs/demo
