# Each target works alone on a fresh clone: Python 3.11 with venv, make, libGL and glib are all it needs.
PYTHON ?= python3.11
OTHER_PYTHONS ?= python3.12 python3.13
BIN := .venv/bin
# Two tests at a time, each on a core of its own. Not for tests that start a Ray: two of those on two cores exceed their
# time limits.
TWICE := --numprocesses 2 --dist loadfile --no-loadscope-reorder
OTHER := VIRTUAL_ENV=.venv-other $(BIN)/uv
TOOLS := pytest pytest-timeout pytest-xdist onnx jsonschema kubernetes-validate pycocotools sahi "moto[s3]" flask flask-cors
READY := .venv/.ready

.PHONY: demo test test-long test-pythons lint clean

# scenes -> tiles -> soft labels -> students -> numbers -> runs/demo/report.html
demo: $(READY)
	$(BIN)/softlabel demo --run-dir runs/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TWICE) tests/unit tests/numerics
	$(BIN)/pytest --durations 30 tests/gpu tests/integration

# What `make test` leaves out: every seed of every fault, and whatever takes minutes.
test-long: lint test-pythons
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TWICE) -m long tests/unit tests/numerics
	$(BIN)/pytest -m long tests/integration

# The unit tests on the other Pythons that pyproject.toml allows, and with the oldest versions of its dependencies.
test-pythons: $(READY)
	for python in $(OTHER_PYTHONS); do \
	    $(OTHER) venv --quiet --clear --python $$python .venv-other && \
	    $(OTHER) pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable ".[dev]" && \
	    OMP_NUM_THREADS=1 .venv-other/bin/pytest $(TWICE) tests/unit || exit 1; \
	done
	$(OTHER) venv --quiet --clear --python $(PYTHON) .venv-other
	$(OTHER) pip install --quiet --resolution lowest-direct --build-constraint constraints.txt --editable ".[openvino,onnx,stac]" \
	    "python-dateutil>=2.9,<3"  # as the tools want it
	$(OTHER) pip freeze --exclude-editable > .venv-other/oldest.txt
	$(OTHER) pip install --quiet --constraint .venv-other/oldest.txt $(TOOLS)
	OMP_NUM_THREADS=1 .venv-other/bin/pytest $(TWICE) tests/unit
	rm -rf .venv-other

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
	rm -rf .venv .venv-other runs
