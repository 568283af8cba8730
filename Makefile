# Two commands for a newcomer: `make run` and `make test`. `make help` lists the rest.
#
# Variables, all optional:
#   PROMPT="..."      what `make run` completes
#   VENV=folder       environment to use (made when missing)          PYTHON=python3.12   interpreter that makes it
#   TORCH="..."       what to install when the environment has no torch
#   FASTDL_CUDA=auto|on|off  FASTDL_CUDA_ARCHS="80 90a +PTX"|all  FASTDL_WERROR=1  FASTDL_JOBS=n  CXX=...   see setup.py
#   PYTEST_ARGS="..." passed to pytest by `make test`, `make sanitize` and `make bench`
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
LINTERS := ruff==0.17.5 clang-format==23.1.5

# The prompt reaches the shell through the environment, and $(value) keeps make from expanding it, so that quotes,
# dollar signs and $(shell ...) in it are only text.
export FASTDL_PROMPT := $(value PROMPT)
unexport PROMPT

LIBRARY := fastdl/libfastdl_ops.so
SOURCES := CMakeLists.txt setup.py tools/schema_hash.py $(shell find csrc -type f) $(wildcard fastdl/ops/*.py)
CPP := find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
# Stamps live in the environment, so that a second run asks pip nothing.
STAMP := $(VENV)/.fastdl

.PHONY: help run test build wheel sanitize triton-compile compile-all cuda-report gpu bench examples lint format clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

run: $(STAMP)-install ## environment, build, demo model, text streaming to the terminal: make run PROMPT="..."
	@[ -f "$$(cat $(STAMP)-model 2>/dev/null)" ] || \
	  { model=$$($(PY) -c 'from fastdl.llm import pull; print(pull.pull())'); echo "$$model" > $(STAMP)-model; }
	@$(VENV)/bin/fastdl generate -m "$$(cat $(STAMP)-model)" -- "$${FASTDL_PROMPT:-The capital of France is}"

test: $(STAMP)-test ## environment, build, every test this machine can run
	$(PY) -m pytest -n auto $(PYTEST_ARGS)

build: $(LIBRARY) ## the native libraries, in the source tree

wheel: $(STAMP)-build ## dist/*.whl with code for every CUDA architecture, checked in a fresh environment
	rm -rf dist build/lib* build/bdist*
	FASTDL_CUDA_ARCHS="$${FASTDL_CUDA_ARCHS:-all}" $(PY) -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	PYTHON="$(PY)" TORCH="$(TORCH)" tools/check_wheel.sh dist/*.whl

sanitize: $(STAMP)-test ## the native kernels under the address and undefined-behaviour sanitizers
	tools/sanitize.sh $(PY) $(PYTEST_ARGS)

triton-compile: $(STAMP)-test ## every Triton kernel and configuration, compiled for every architecture; needs no GPU
	$(PY) tools/triton_compile.py

gpu: ## on a machine with an NVIDIA GPU: build, GPU tests, compute-sanitizer, benchmarks; make gpu ROOM=norm
	@$(PYTHON) tools/gpu.py $(if $(ROOM),--room "$(ROOM)")

bench: $(STAMP)-bench ## benchmarks of every room against named peers
	$(PY) -m pytest bench $(PYTEST_ARGS)

examples: $(STAMP)-bench ## the models of examples/, with what they check; plots land in build/examples
	mkdir -p build/examples
	$(PY) examples/char_rnn.py --plot build/examples/char_rnn.png
	$(PY) examples/zaremba_lstm.py --plot build/examples/zaremba_lstm.png
	$(PY) examples/pointer_network.py --plot build/examples/pointer_network.png
	$(PY) examples/seq2seq.py --plot build/examples/seq2seq.png
	$(PY) examples/sort_sets.py --plot build/examples/sort_sets.png

compile-all: $(STAMP)-test ## every CUDA source for every architecture, warnings are errors, no spills
	FASTDL_CUDA=on FASTDL_CUDA_ARCHS=all FASTDL_WERROR=1 $(PY) setup.py --quiet build_ext --build-lib build/compile-all
	$(PY) tools/cuda_report.py --check build/compile-all/fastdl/libfastdl_ops.so

cuda-report: $(STAMP)-test ## registers, shared memory and spills of every CUDA kernel
	$(PY) tools/cuda_report.py

lint: $(STAMP)-lint ## ruff and clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(CPP) | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP)-lint ## let ruff and clang-format rewrite the files
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(CPP) | xargs $(VENV)/bin/clang-format -i

clean: ## remove what was built; the environment stays
	rm -rf build dist *.egg-info fastdl/*.so

# ---- environment and build --------------------------------------------------------------------------------------
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastdl needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments. Type: sudo apt-get install python3-venv" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "no C++ compiler. Type: sudo apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP)-torch: | $(PY)
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || \
	  { echo "installing $(TORCH)"; $(PIP) $(TORCH); }
	@touch $@

$(STAMP)-build: $(STAMP)-torch
	$(PIP) "setuptools>=77" wheel "cmake>=3.22" ninja "pybind11>=2.12" numpy
	@touch $@

$(LIBRARY): $(SOURCES) | $(STAMP)-build
	$(PY) -W ignore setup.py --quiet build_ext --inplace
	@touch $@

# The library is built above, where its progress is seen; pip's editable install then finds nothing left to compile.
$(STAMP)-install: pyproject.toml setup.py $(LIBRARY)
	@if [ ! -e $@ ] || [ pyproject.toml -nt $@ ] || [ setup.py -nt $@ ]; then \
	  echo "installing fastdl and its requirements"; $(PIP) --no-build-isolation -e ".[llm]"; touch $(LIBRARY); fi
	@touch $@

$(STAMP)-test: $(STAMP)-install
	@if [ ! -e $@ ] || [ pyproject.toml -nt $@ ]; then \
	  echo "installing test requirements"; $(PIP) --no-build-isolation -e ".[llm,test]"; touch $(LIBRARY) $<; fi
	@touch $@

$(STAMP)-bench: $(STAMP)-install
	@if [ ! -e $@ ] || [ pyproject.toml -nt $@ ]; then \
	  echo "installing benchmark requirements"; $(PIP) --no-build-isolation -e ".[llm,bench]"; touch $(LIBRARY) $<; fi
	@touch $@

$(STAMP)-lint: Makefile | $(PY)
	$(PIP) $(LINTERS)
	@touch $@
