# make demo      install, train on OpenMoji for ten minutes, and write a report (BUDGET=3m: a shorter run;
#                SET=scenes: on scenes that the project renders)
# make test      install, then run every test (TESTS=tests/data: some tests; WORKERS=4: number of processes)
# make quick     the tests that take seconds
# make long      tests that train for minutes; `make test` leaves them out
# make lint      ruff and mypy
# make install   install everything (into .venv; VENV=elsewhere, PYTHON=python3.12)
# make clean     remove the virtual environment and caches; keeps runs/ and data/

PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 10m
SET ?= openmoji
TESTS ?=
WORKERS ?= 2

installed = $(VENV)/installed-all
for_demo = $(VENV)/installed-demo
python = $(VENV)/bin/python

.PHONY: demo test quick long lint format install clean

demo: $(for_demo)
	@$(python) tools/demo.py --budget $(BUDGET) --set $(SET)

test: $(installed)
	@WORKERS=$(WORKERS) sh tests/everything.sh $(python) $(TESTS)

quick: $(installed)
	$(python) -m pytest -m "not slow" $(TESTS)

long: $(installed)
	$(python) -m pytest -m long $(TESTS)

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(installed)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

install: $(installed)

# The stamp comes last, so that an interrupted install is repeated and a complete one is not.
# `make demo` leaves out the packages of the tests, which would double the time of the install.
$(installed): pyproject.toml constraints.txt tools/install.sh
	@PYTHON="$(PYTHON)" sh tools/install.sh "$(VENV)" demo,eval,test
	@touch $(for_demo) $(installed)

$(for_demo): pyproject.toml constraints.txt tools/install.sh
	@PYTHON="$(PYTHON)" sh tools/install.sh "$(VENV)" demo
	@touch $(for_demo)

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
