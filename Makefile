# Everything runs from .venv, which the first target that needs it sets up; nothing has to be activated.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready
MODEL ?= smollm2-135m-dsa
DEMO := outputs/demo_$(shell date +%Y%m%dT%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types fmt bench

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## Trace RULER on the default model, or on MODEL=tiny-random, analyze the trace, print the tables
	$(RUN) dsakv trace ruler --model $(MODEL) --tasks niah_single_1,niah_single_2 --limit 4 --context-length 4096 \
		--max-new-tokens 32 --temperature 0 --batch-size 4 --trace-out $(DEMO)
	$(RUN) dsakv analyze --input $(DEMO) --block-sizes 16,32,64 --lru-caps 0.2,0.4,0.6,0.8 --policies all \
		--ws-windows 1,4,10,16 --report $(DEMO)/report.html

test: $(READY)  ## Run all tests, as many at a time as there are cores
	$(RUN) pytest -n auto --dist worksteal

check: lint types test  ## Lint, types and tests

lint: $(READY)  ## Check style and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(READY)  ## Check types
	$(RUN) mypy

fmt: $(READY)  ## Format the code and mend what can be mended
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

bench: $(READY)  ## Run the benchmarks in scripts/
	@for script in $(sort $(wildcard scripts/bench_*.py)); do \
		echo "== $$script" && $(VENV)/bin/python $$script || exit 1; \
	done

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: $(PYTHON) is not there, or older than Python 3.10" >&2; \
		echo "hint: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "error: $(PYTHON) cannot make a virtual environment" >&2; \
		echo "hint: install its venv module, on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(RUN) pip install -c constraints.txt -e ".[dev]"
	@touch $@
