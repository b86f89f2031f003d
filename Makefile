VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h')
DEMO ?= demo-out

.PHONY: help setup test demo bench lint type fmt clean

help:
	@echo "make demo   make a model pair from real images, fine-tune it until it forgets, tailor it, print the table"
	@echo "make test   run every test (sets up $(VENV) when it is missing)"
	@echo "make bench  time the ops against eager torch"
	@echo "make lint | type | fmt"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $(STAMP)

# One thread: the tests are many small problems, on which a second thread only spins.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest

demo: $(STAMP)
	$(PY) -m benchmarks.demo --work $(DEMO)

bench: $(STAMP)
	$(PY) -m pytest benchmarks -o addopts= --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

type: $(STAMP)
	$(PY) -m mypy

fmt: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build *.egg-info tailor_fast/_C*.so
