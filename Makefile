# make demo | make test: each prepares .venv once (Python 3.10 to 3.13) and runs.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-slow test-chips test-all test-sanitize test-sanitize-stand-in test-aarch64 test-stand-in test-fake-gpu test-fake-gpu-suite test-gpu-versions test-lowest-versions test-versions lint docs bench gpu-cache clean

help:
	@echo "make demo | test | test-slow | test-chips | test-all | test-sanitize | test-sanitize-stand-in | test-aarch64 | test-stand-in | test-fake-gpu | test-fake-gpu-suite | test-versions | lint | docs | bench | gpu-cache DIR=folder | clean"

demo: $(READY)
	$(BIN)/cosface demo

# Two workers: the suite is built for two cores. Tests that share processes share a worker (xdist_group).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
unexport PYTHONDONTWRITEBYTECODE  # else every worker and every process of a test compiles all modules again

# What is slow, and why: tests/selection.py.
test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m "slow and not chips"

# Every launch compiled for sm_80, 90 and 100, 1,404 kernels; .cache/ahead_of_time remembers those that have not changed. After a change of
# a kernel or its tiles. CONTRIBUTING.md says how long it takes.
test-chips: $(READY)
	$(BIN)/python -m pytest -m chips

test-all: $(READY)
	$(PYTEST)

# The native kernels' own tests, a grid of the backend's, and every default dtype, with the library compiled for AddressSanitizer and
# UndefinedBehaviorSanitizer. Python's own leaks at exit are none of its business; without libstdc++ beside it, libasan finds no
# __cxa_throw for PyTorch's exceptions.
SANITIZED := ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)"
test-sanitize: $(READY)
	COSFACE_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize
	COSFACE_CPU_LIBRARY=$(CURDIR)/build/sanitize/cosface_kernels/ops/backends/libcosface_cpu.so $(SANITIZED) $(BIN)/python -m pytest -n 2 \
		tests/test_native.py tests/test_backends.py tests/test_forms.py tests/test_defaults.py -k "(native or cpu-cpu) and not triton and not attend"

# The same of the stand-in for AMX, below: its tiles, and what reads and writes around them.
test-sanitize-stand-in: $(READY)
	COSFACE_SANITIZE=1 COSFACE_STAND_IN=amx $(BIN)/python setup.py -q build_ext --build-lib build/sanitize_stand_in \
		--build-temp build/sanitize_stand_in
	COSFACE_CPU_LIBRARY=$(CURDIR)/build/sanitize_stand_in/cosface_kernels/ops/backends/libcosface_cpu.so $(SANITIZED) \
		$(BIN)/python -m pytest tests/test_native.py -k amx

# The native kernels for ARM, cross-compiled and compared with the same in double under emulation. Debian has what it needs in
# g++-aarch64-linux-gnu and qemu-user.
AARCH64 := build/aarch64
test-aarch64: $(READY)
	COSFACE_MACHINE=aarch64 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ LDCXXSHARED="aarch64-linux-gnu-g++ -shared" \
		$(BIN)/python setup.py -q build_ext --build-lib $(AARCH64) --build-temp $(AARCH64)
	aarch64-linux-gnu-g++ -std=c++17 -O1 -Wno-psabi -fopenmp tests/aarch64/compare.cpp -o $(AARCH64)/compare -ldl
	qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu $(AARCH64)/compare \
		$(AARCH64)/cosface_kernels/ops/backends/libcosface_cpu.so portable neon neonbf16

# The native kernels for AVX-512 and AMX with plain functions in place of their instructions, on any x86-64.
test-stand-in: $(READY)
	COSFACE_STAND_IN="avx512 avx512bf16 amx" $(BIN)/python setup.py -q build_ext --build-lib build/stand_in --build-temp build/stand_in
	COSFACE_CPU_LIBRARY=$(CURDIR)/build/stand_in/cosface_kernels/ops/backends/libcosface_cpu.so \
		$(BIN)/python -m pytest tests/test_native.py tests/test_formats.py -k "avx512 or amx"

# What only the CUDA builds of PyTorch and Triton show, in the versions of the GPU machine: 700 MB to download once, no GPU.
GPU := build/gpu
ON_FAKE := LD_LIBRARY_PATH=$(CURDIR)/$(GPU)/fake TRITON_LIBCUDA_PATH=$(CURDIR)/$(GPU)/fake TRITON_CACHE_DIR=$(CURDIR)/$(GPU)/cache
test-fake-gpu: $(GPU)/.ready
	$(ON_FAKE) FAKE_DEVICES=2 $(GPU)/bin/python -m pytest tests/fake_gpu/checks.py

# Every test that a GPU would run, there: numbers mean nothing, so what fails met an error of Python or C++.
test-fake-gpu-suite: $(GPU)/.ready
	$(ON_FAKE) PYTORCH_NO_CUDA_MEMORY_CACHING=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(GPU)/bin/python -m pytest -m gpu -n 2 \
		-p tests.fake_gpu.errors --assert=plain -rx tests

# What other versions of PyTorch, Triton and NumPy may break: loss and gradients in every backend, the operators' own checks, compiled
# heads, optimisers, checkpoints, DTensors in one process.
BY_VERSION := -m "not slow" -k "not test_ranks" $(patsubst %,tests/test_%.py,backends rows triton_update gpu launches slabs operators \
	autograd functional optim sampled_optim module margin_modules float8 statistics checkpoint sharded)

# The GPU machine's versions without a GPU, and what is compiled ahead of time in them.
test-gpu-versions: test-fake-gpu $(READY)
	$(ON_FAKE) FAKE_DEVICES=0 $(GPU)/bin/python -m pytest -n 2 --dist loadgroup $(BY_VERSION)
	$(ON_FAKE) FAKE_DEVICES=0 $(GPU)/bin/python -m pytest tests/test_hopper.py tests/test_ahead_of_time.py::test_what_is_launched_unasked

# The lowest versions that pyproject.toml allows: 1.1 GB to download once.
LOWEST := build/lowest
test-lowest-versions: $(LOWEST)/.ready
	LD_LIBRARY_PATH=$(CURDIR)/$(LOWEST)/no_gpu $(LOWEST)/bin/python -m pytest -n 2 --dist loadgroup $(BY_VERSION)

test-versions: test-lowest-versions test-gpu-versions

$(GPU)/.ready: requirements-gpu.txt requirements-beside.txt $(wildcard tests/fake_gpu/*.cpp) tests/fake_gpu/build.py
	@test -x $(GPU)/bin/python || $(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-gpu.txt
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(GPU)/cuda \
		nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88
	$(GPU)/bin/python tests/fake_gpu/build.py $(GPU)/fake $(GPU)/cuda/nvidia/cu13/include
	@touch $@

$(LOWEST)/.ready: $(READY) requirements-lowest.txt requirements-beside.txt $(wildcard tests/fake_gpu/*.py)
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-lowest.txt
	$(LOWEST)/bin/python tests/fake_gpu/no_gpu.py $(LOWEST)/no_gpu
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The API's pages, of docstrings: build/api/index.html.
docs: .venv/.docs-ready
	$(BIN)/python docs/build_api.py build/api

.venv/.docs-ready: $(READY) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

# Compiles what a visit to a GPU launches, with the GPU machine's Triton: DIR is taken along.
gpu-cache: $(GPU)/.ready
	@test -n "$(DIR)" || { echo "usage: make gpu-cache DIR=folder"; exit 1; }
	$(ON_FAKE) FAKE_DEVICES=0 $(GPU)/bin/python -m benchmarks.gpu_cache $(DIR)

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
