# Everything runs in a virtual environment inside the checkout, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: test test-all gpu demo bench lint format clean

# Kernels run in Triton's interpreter, then as compiled, in an emulator: a process cannot do both.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 5

$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sleep-ops needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,bench,test]'
	touch $@

test: $(VENV)/.installed lint
	$(PYTEST) -m "not slow"
	@echo 'kernels as compiled for sm_80 and sm_90, emulated:'
	$(PYTEST) -m "not slow" tests/ptx

test-all: $(VENV)/.installed lint
	$(PYTEST)
	$(PYTEST) tests/ptx
	$(PYTEST) --emulated 90 -k 'bfloat16 and not torch' tests/test_chunk_kernels.py tests/test_window.py tests/test_sleep_operator.py

gpu: $(VENV)/.installed
	$(BIN)/sleep-ops verify --out runs/gpu

demo: $(VENV)/.installed
	$(BIN)/sleep-ops demo --out $(OUT)

bench: $(VENV)/.installed
	$(BIN)/sleep-ops bench passes --out runs/bench
	$(BIN)/sleep-ops bench kernels --out runs/bench
	$(BIN)/sleep-ops bench kernels --sweep tokens --case mid --out runs/bench
	$(BIN)/sleep-ops bench kernels --sweep window --case long --out runs/bench
	$(BIN)/sleep-ops bench train --out runs/bench
	$(BIN)/python -m pytest benchmarks --benchmark-json runs/bench/operators.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info
