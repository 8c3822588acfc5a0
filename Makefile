# Sluice's commands. `make serve` and `make test` set everything up by themselves; they need python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
MODELS := deploy/models
SERVE_FLAGS ?=

.PHONY: help setup serve demo test check proto models bench loadtest image clean

help:
	@echo "make serve     serve the demo models on ports 8001 (gRPC), 8000 (HTTP), 8002 (metrics)"
	@echo "make demo      serve them, send the test digits, print accuracy and speed, end"
	@echo "make test      run the tests          make check   ruff, mypy, import-linter, generated code"
	@echo "make bench     the benchmark table    make models  train the demo models again"
	@echo "make proto     generate the protobuf code again"

# The server alone: what `make serve` needs.
$(VENV)/.server: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Sluice needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 cannot make virtual environments here: install its venv package (Debian: apt install python3-venv)"; exit 1; }
	@echo "Installing the server into $(VENV) (the first time only) ..."
	@$(PIP) install --constraint constraints.txt --editable '.[server]'
	@touch $@

# Everything for development: what `make test` needs.
$(VENV)/.dev: $(VENV)/.server
	@echo "Installing the development tools into $(VENV) (the first time only) ..."
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.dev

serve: $(VENV)/.server
	@echo "Serving $(MODELS); Ctrl-C ends it. From another terminal:"
	@echo "  $(BIN)/sluice status"
	@echo "  $(BIN)/sluice infer digits_mlp --fill random"
	@exec $(BIN)/sluice serve --model-repository $(MODELS) $(SERVE_FLAGS)

demo: $(VENV)/.server
	@$(BIN)/python deploy/demo.py

test: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/batching --cov --cov-fail-under=100
	@$(BIN)/python -m pytest --ignore tests/batching

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python proto/generate.py --check

proto: $(VENV)/.dev
	@$(BIN)/python proto/generate.py

models: $(VENV)/.dev
	@for name in digits_mlp digits_svm breast_cancer diabetes; do $(BIN)/python deploy/train/$$name.py || exit 1; done

bench: $(VENV)/.dev
	@$(BIN)/python -m loadtests.bench $(BENCH_FLAGS)

loadtest image:
	@echo "make $@ is not implemented in this version"; exit 2

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis .coverage .import_linter_cache
