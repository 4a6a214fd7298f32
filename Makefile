# All commands of the project; CI calls the same targets. `make` alone lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# One thread per process: the tests start several processes on few cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install quickstart test unit distributed e2e gpu bench lint types format check docs

help:
	@echo "make install      .venv with everything that tests and quickstart need"
	@echo "make quickstart   distil a real language model on this machine"
	@echo "make test         lint, types, unit, distributed and e2e tests"
	@echo "make unit | distributed | e2e | lint | types    one part of it"
	@echo "make gpu          check a machine with a CUDA device: numbers, a run, speed, tests/gpu"
	@echo "make check        lint, types and unit tests: before every push"
	@echo "make format       format the code and repair what ruff can"
	@echo "make bench        time and memory of the losses beside other systems'"
	@echo "make docs         rewrite the files generated from the configuration schema"

install: .venv/.installed

.venv/.installed: requirements/cpu.txt requirements/install.sh pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	bash requirements/install.sh $(BIN)/python
	touch $@

quickstart: .venv/.installed
	$(BIN)/megatron-gkd-quickstart

test: lint types unit distributed e2e

check: lint types unit

unit: .venv/.installed
	$(PYTEST) tests/unit -n 2

# Two workers, each with its own pools of ranks: while the ranks of one wait for each other, those of the other compute.
distributed: .venv/.installed
	$(PYTEST) tests/distributed -n 2 --dist worksteal

# One after another: every run of theirs fills both cores.
e2e: .venv/.installed
	$(PYTEST) tests/e2e

# All stages; for some of them, or a smoke run on a CPU: tools/gpu_check.py --help.
gpu: .venv/.installed
	$(BIN)/python tools/gpu_check.py --out runs/gpu_check

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: .venv/.installed
	$(BIN)/pyright

format: .venv/.installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/.installed
	$(BIN)/python -m megatron_gkd.config.document

# Other systems beside the locked environment, which stays as it is.
.venv-bench/.installed: .venv/.installed requirements/bench.txt
	test -x .venv-bench/bin/python || $(BIN)/python -m venv .venv-bench
	echo "$(CURDIR)" > .venv-bench/lib/python3.11/site-packages/locked.pth
	echo "$(CURDIR)/.venv/lib/python3.11/site-packages" >> .venv-bench/lib/python3.11/site-packages/locked.pth
	.venv-bench/bin/pip install --no-deps -r requirements/bench.txt
	touch $@

bench: .venv-bench/.installed
	mkdir -p runs/bench
	OMP_NUM_THREADS=1 .venv-bench/bin/python tools/bench/loss.py --json runs/bench/loss.json --plot runs/bench/loss.png
	OMP_NUM_THREADS=1 .venv-bench/bin/python tools/bench/scaling.py --json runs/bench/scaling.json
