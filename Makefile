# make demo: the embedded example into runs/demo.   make test: the tests.   Both use .venv, made on first use.
# make soak: 200 kills.   make bench, bench-bergson: tables of docs/cost.md.   make clean keeps runs/.
# make docs: docs/ as a site in build/site; links that lead nowhere are errors.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test soak lint docs bench bench-bergson clean

$(VENV)/.installed: pyproject.toml
	@echo "installing torch and the rest into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[dev,peft]"
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

# in an environment of its own: the pages need nothing of the package
build/docs/.installed: pyproject.toml
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --upgrade pip
	build/docs/bin/python -m pip install --quiet --group docs
	touch $@

docs: build/docs/.installed
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict
	@echo "build/site/index.html"

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.speed

bench-bergson: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bergson

clean:
	rm -rf $(VENV) build dist *.egg-info
