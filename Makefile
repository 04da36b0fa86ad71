# Each target makes the virtual environment it needs, once.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
DOCS ?= .venv-docs
RELEASE ?= .venv-release
BIN = $(VENV)/bin
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL = $(BIN)/python $(PIP)

.PHONY: demo test check bitwise test-cpp test-types test-oldest test-newest lint types tests fast docs tutorial release-check homepage studies quick-studies clean
FAST = $(addprefix tests/,linalg objective hessian slices curves alignment minima penalty report test_layering.py test_settings.py)
STUDIES = poison lambda_max shift layers trace_regularizer trace_noise

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

test: lint types tests

# In a minute, while you work: no real Trainer, no second process, no page of the documentation.
check: lint types fast

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# One thread per process, since the processes run in parallel. Tests of a file share what took long to
# make (a run, a reference), and files that fork real processes one server: tests/scheduling.py.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(1)/python -m pytest -n 2 --dist loadfile

tests: $(VENV)/.test
	$(call PYTEST,$(BIN)) $(ARGS)

fast: $(VENV)/.test
	$(call PYTEST,$(BIN)) $(FAST) $(ARGS)

# A thousand random pairings of what a run can have with what a monitor can do, each against the run
# without: the bits are the same. Half an hour on two cores; PAIRINGS and FIRST choose others.
bitwise: $(VENV)/.test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PAIRINGS=$${PAIRINGS:-1000} $(BIN)/python -m pytest -q -n 2 tests/callbacks/test_pairings.py $(ARGS)

# Operators in C++, which take ten seconds and a compiler.
test-cpp: $(VENV)/.test
	LLA_CPP=1 $(BIN)/python -m pytest -q tests/objective/test_cpp_operators.py $(ARGS)

# What a user's mypy says with either Trainer: half a minute for Lightning's own types.
test-types: $(VENV)/.test
	LLA_TYPES=1 $(BIN)/python -m pytest -q tests/test_typing.py $(ARGS)

# The whole suite with the oldest releases that setup.cfg allows; 3 GB to download, 6 on disk, since torch
# of that time comes with CUDA. What old releases warn about is theirs.
test-oldest: $(OLDEST)/.test
	$(call PYTEST,$(OLDEST)/bin) -W default $(ARGS)

# The whole suite with the newest releases that it has seen, which pip gives users before the pins of
# constraints.txt follow. What they warn about is theirs, until it is mended here.
test-newest: $(NEWEST)/.test
	$(call PYTEST,$(NEWEST)/bin) -W default $(ARGS)

# The field's claims, each with a verdict; a second run changes no table (git diff). Half an hour on two
# cores. With DATA=FOLDER the shift study takes MNIST and LLA's LeNet from there.
studies: $(VENV)/.demo
	for study in $(STUDIES); do $(BIN)/python examples/studies/$$study.py --out docs/studies || exit 1; done
	if [ -n "$(DATA)" ]; then $(BIN)/python examples/studies/shift.py --data $(DATA) --out docs/studies/mnist; fi
	$(BIN)/python examples/studies/claims.py docs/studies docs/claims.md

quick-studies: $(VENV)/.demo
	for study in $(STUDIES); do $(BIN)/python examples/studies/$$study.py --quick --out studies || exit 1; done

# The site from docs/, in site/; an API reference from the docstrings. Warnings are errors.
# docs/tutorial.md, from examples/tutorial.py.
tutorial: $(VENV)/.demo
	$(BIN)/python docs/make_tutorial.py

docs: $(DOCS)/.docs
	rm -rf site
	$(DOCS)/bin/python -m sphinx -q -W --keep-going -c docs/site docs site
	@echo "The site is in site/index.html."

# Everything but the upload: sdist and wheel, their metadata, and README's first snippet by either, each in
# an environment that has nothing else. CONTRIBUTING.md has the steps around it.
release-check: $(RELEASE)/.release
	rm -rf dist build $(RELEASE)/wheel $(RELEASE)/sdist $(RELEASE)/run
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(PYTHON) .ci/release.py files
	# Without PYTHONPATH, which would show pip and the snippet a checkout.
	unset PYTHONPATH; for built in wheel sdist; do \
		case $$built in wheel) file=dist/*.whl;; sdist) file=dist/*.tar.gz;; esac; \
		$(PYTHON) -m venv $(RELEASE)/$$built && $(RELEASE)/$$built/bin/python $(PIP) $$file || exit 1; \
		mkdir -p $(RELEASE)/run/$$built && cd $(RELEASE)/run/$$built || exit 1; \
		$(abspath $(RELEASE))/$$built/bin/python -I $(CURDIR)/.ci/release.py snippet || exit 1; cd $(CURDIR); \
	done

# Once the repository has an address: README's links, metadata and citation lead to it.
homepage:
	$(PYTHON) .ci/release.py homepage $(URL)

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(DOCS) $(RELEASE) logs studies site dist build

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

$(DOCS)/.docs: constraints.txt setup.cfg
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP) -e ".[docs]"
	touch $@

$(RELEASE)/.release: constraints.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python $(PIP) build twine
	touch $@
