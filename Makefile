# make demo: the embedded example into runs/demo.   make test: the tests.   Both use .venv, made on first use.
# make soak: 200 kills.   make bench, bench-bergson: the tables of the README.   make clean keeps runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test soak lint bench bench-bergson clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,peft]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/alphatoken run run.dir=runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

soak: $(VENV)/.installed
	$(BIN)/python -m tests.faults.soak 200

lint: $(VENV)/.installed
	mkdir -p $(VENV)/typed/alphatoken
	ln -sfn $(CURDIR)/alphatoken/__init__.py $(VENV)/typed/alphatoken/__init__.py
	for part in pipeline jobs data_schemas; do ln -sfn $(CURDIR)/$$part $(VENV)/typed/alphatoken/$$part; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.speed

bench-bergson: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bergson

clean:
	rm -rf $(VENV) build dist *.egg-info
