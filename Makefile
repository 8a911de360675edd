# Each target works alone on a fresh clone: Python 3.11 with venv, make, libGL and glib are all it needs.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-long lint clean

# scenes -> tiles -> soft labels -> students -> numbers -> runs/demo/report.html
demo: $(READY)
	$(BIN)/softlabel demo --run-dir runs/demo

test: lint
	$(BIN)/pytest

# Every seed of every fault, and whatever takes minutes.
test-long: lint
	$(BIN)/pytest -m "long or not long"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
