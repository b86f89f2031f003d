VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h')
DEMO ?= demo-out
TRITON36 := .venv-triton36
INTEGRATIONS := .venv-integrations
PROGRAMS := $(basename $(notdir $(wildcard tests/integrations/packages/*.txt)))

.PHONY: help setup triton36 ray test asan demo quality quality-full bench docs lint type fmt clean

help:
	@echo "make demo   make a model pair from real images, fine-tune it until it forgets, tailor it, print the table"
	@echo "make test   run every test (sets up $(VENV) when it is missing)"
	@echo "make asan   run the native kernels' tests under AddressSanitizer and UBSan"
	@echo "make quality  every method on the hard LLaVA protocols (a quarter of an hour); quality-full: all protocols (many hours)"
	@echo "make bench  time the ops against eager torch"
	@echo "make docs   build the documentation into build/site"
	@echo "make lint | type | fmt"

setup: $(STAMP)

# A torch for CUDA brings the triton that it was built for; one for the CPU brings none.
$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev,docs]'
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check triton==3.8.0
	touch $(STAMP)

# The oldest triton that is supported, in a folder of its own: the compile tests put it on their path
# before the installed one. Without a network they are skipped and say so.
triton36: $(STAMP)
	@test -f $(TRITON36)/.installed || { \
	  $(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(TRITON36) triton==3.6.0 \
	  && touch $(TRITON36)/.installed; \
	} || echo "triton 3.6.0 could not be installed: tests that need it are skipped"

# Only the test of `batch --ray` needs it.
ray: $(STAMP)
	@$(PY) -c 'import ray' 2>/dev/null \
	  || $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ray]' \
	  || echo "ray could not be installed: tests that need it are skipped"

# Programs that this one works in, each in a folder of its own, with nothing but what the tests need
# of it and .venv lacks. Without a network their tests are skipped and say so.
.PHONY: integrations
integrations: $(PROGRAMS:%=$(INTEGRATIONS)/%/.installed)

$(INTEGRATIONS)/%/.installed: tests/integrations/packages/%.txt $(STAMP)
	@rm -rf $(@D) && $(PY) -m pip install -q --disable-pip-version-check --no-deps --no-compile \
	  --target $(@D) -r $< && touch $@ \
	  || echo "$* could not be installed: tests that need it are skipped"

# Two processes of one thread each: the tests are many small problems, on which a second thread only
# spins. A file's tests stay together, and so do its fixtures.
JOBS ?= 2
test: export OMP_NUM_THREADS = 1
test: $(STAMP) triton36 ray integrations
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile

# The native kernels under AddressSanitizer and UBSan, in a copy of the tree. Python's own memory is
# not of interest, so leaks are not looked for; capture stays off file descriptors, or the sanitizer's
# report would be lost with the process.
ASAN := build/asan
CXX_LIB = $$($${CXX:-g++} -print-file-name=$(1))
asan: $(STAMP)
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -r tailor_fast csrc tests benchmarks setup.py pyproject.toml README.md LICENSE $(ASAN)
	rm -f $(ASAN)/tailor_fast/_C*.so
	cd $(ASAN) && TAILOR_FAST_SANITIZE=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	cd $(ASAN) && OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$(call CXX_LIB,libasan.so) $(call CXX_LIB,libubsan.so) $(call CXX_LIB,libstdc++.so)" \
	  $(abspath $(PY)) -m pytest -q --capture=sys -p no:cacheprovider tests/ops/codec tests/ops/gram tests/ops/test_gemm.py \
	  tests/ops/select tests/ops/decorate/test_native.py

demo: $(STAMP)
	$(PY) -m benchmarks.demo --work $(DEMO)

# What was measured is kept in build/quality; a stopped run goes on where it ended.
QUALITY = $(PY) -m benchmarks.quality --out benchmarks/results/quality
quality: $(STAMP)
	$(QUALITY)
	$(PY) -m benchmarks.quality.page

quality-full: $(STAMP)
	$(QUALITY) --plan full
	$(PY) -m benchmarks.quality.page

bench: $(STAMP)
	$(PY) -m pytest benchmarks -o addopts= --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(PY) -m mkdocs build

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
