# Each target makes the virtual environment it needs, once.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bitwise test-oldest test-newest lint types tests studies quick-studies clean
STUDIES = poison lambda_max shift layers trace_regularizer

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

# A thousand random pairings of what a run can have with what a monitor can do, each against the run
# without: the bits are the same. Half an hour on two cores; PAIRINGS and FIRST choose others.
bitwise: $(VENV)/.test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PAIRINGS=$${PAIRINGS:-1000} $(BIN)/python -m pytest -q -n 2 tests/callbacks/test_pairings.py $(ARGS)

# The whole suite with the oldest releases that setup.cfg allows; 3 GB to download, 6 on disk, since torch
# of that time comes with CUDA. What old releases warn about is theirs.
test-oldest: $(OLDEST)/.test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -W default $(ARGS)

# The whole suite with the newest releases that it has seen, which pip gives users before the pins of
# constraints.txt follow. What they warn about is theirs, until it is mended here.
test-newest: $(NEWEST)/.test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 -W default $(ARGS)

# The field's claims, each with a verdict; a second run changes no table (git diff). Half an hour on two
# cores. With DATA=FOLDER the shift study takes MNIST and LLA's LeNet from there.
studies: $(VENV)/.demo
	for study in $(STUDIES); do $(BIN)/python examples/studies/$$study.py --out docs/studies || exit 1; done
	if [ -n "$(DATA)" ]; then $(BIN)/python examples/studies/shift.py --data $(DATA) --out docs/studies/mnist; fi
	$(BIN)/python examples/studies/claims.py docs/studies docs/claims.md

quick-studies: $(VENV)/.demo
	for study in $(STUDIES); do $(BIN)/python examples/studies/$$study.py --quick --out studies || exit 1; done

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) logs studies

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

# A Python that numpy 1.24 has a build for: 3.10 or 3.11.
$(OLDEST)/.test: constraints-oldest.txt setup.cfg
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt setuptools -e ".[test]"
	touch $@

$(NEWEST)/.test: constraints-newest.txt setup.cfg
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-newest.txt -e ".[test]"
	touch $@
