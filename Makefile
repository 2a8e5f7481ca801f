# make demo      install, then train on OpenMoji for ten minutes and show what came out (BUDGET=3m shortens it)
# make test      install, then run every test (TESTS=tests/data: some; WORKERS=4: so many processes)
# make quick     the tests that take seconds
# make lint      ruff and mypy
# make install   only install (into .venv; VENV=elsewhere, PYTHON=python3.12)
# make clean     remove the virtual environment and caches; runs/ and data/ stay

PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 10m
TESTS ?=
WORKERS ?= 2

installed = $(VENV)/installed
python = $(VENV)/bin/python

.PHONY: demo test quick lint format install clean

demo: $(installed)
	@$(python) tools/demo.py --budget $(BUDGET)

test: $(installed)
	@WORKERS=$(WORKERS) sh tests/everything.sh $(python) $(TESTS)

quick: $(installed)
	$(python) -m pytest -m "not slow" $(TESTS)

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(installed)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

install: $(installed)

# The script leaves the stamp, so that an install that was cut short is taken up again and a whole one is not repeated.
$(installed): pyproject.toml constraints.txt tools/install.sh
	@PYTHON="$(PYTHON)" sh tools/install.sh "$(VENV)" demo,eval,test

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
