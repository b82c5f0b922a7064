# make demo | make test: each prepares .venv once (Python 3.10 to 3.13) and runs.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-slow test-all test-sanitize lint bench gpu-cache clean

help:
	@echo "make demo | test | test-slow | test-all | test-sanitize | lint | bench | gpu-cache DIR=folder | clean"

demo: $(READY)
	$(BIN)/cosface demo

# Two workers: the suite is built for two cores. Tests that share processes share a worker (xdist_group).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

# What is slow, and why: tests/selection.py.
test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

test-all: $(READY)
	$(PYTEST)

# The native kernels' own tests, and a grid of the backend's, with the library compiled for AddressSanitizer and
# UndefinedBehaviorSanitizer. Python's own leaks at exit are none of its business; without libstdc++ beside it, libasan finds no
# __cxa_throw for PyTorch's exceptions.
test-sanitize: $(READY)
	COSFACE_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize
	COSFACE_CPU_LIBRARY=$(CURDIR)/build/sanitize/cosface_kernels/ops/backends/libcosface_cpu.so ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)" $(BIN)/python -m pytest -n 2 \
		tests/test_native.py tests/test_backends.py tests/test_forms.py -k "native or cpu-cpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Compiles for a GPU machine what a visit launches there: DIR is taken along. GPU_PYTHON has that machine's Triton.
GPU_PYTHON ?= $(BIN)/python
gpu-cache: $(READY)
	@test -n "$(DIR)" || { echo "usage: make gpu-cache DIR=folder [GPU_PYTHON=python with the GPU machine's triton]"; exit 1; }
	$(GPU_PYTHON) -m benchmarks.gpu_cache $(DIR)

bench: $(READY)
	$(BIN)/cosface bench

$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/cpu/*)
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14)' 2>/dev/null || \
		{ echo "cosface-kernels needs Python 3.10 to 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(READY)

clean:
	rm -rf .venv .cache build dist *.egg-info demo-output cosface_kernels/ops/backends/*.so
