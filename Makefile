# Each target makes the virtual environment it needs, once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types tests clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

test: lint types tests

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# One thread per process, since the processes run in parallel.
tests: $(VENV)/.test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

clean:
	rm -rf $(VENV) logs

$(VENV)/.python: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	touch $@

$(VENV)/.demo: $(VENV)/.python setup.cfg
	$(INSTALL) -e ".[examples]"
	touch $@

$(VENV)/.test: $(VENV)/.python setup.cfg
	$(INSTALL) -e ".[test]"
	touch $@ $(VENV)/.demo
