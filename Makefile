# make demo | make test: each prepares .venv once (Python 3.10 to 3.13) and runs.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test lint bench clean

help:
	@echo "make demo | test | lint | bench | clean"

demo: $(READY)
	$(BIN)/cosface demo

# Two workers: the suite is built for two cores.
test: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/cosface bench

$(READY): requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14)' 2>/dev/null || \
		{ echo "cosface-kernels needs Python 3.10 to 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info demo-output
