# The only entries; CI and people call the same targets. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-complete

.DEFAULT_GOAL := help
.PHONY: help setup demo lint test sanitize fuzz mutants bench reports clean
.PHONY: system-packages native-packages fuzz-packages test-packages

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(SETUP) ## make .venv with the pinned dependencies, the descriptors of proto and the native extensions

demo: setup system-packages ## package a model, serve it in every way, print the table (about five minutes)
	$(BIN)/python benchmarks/demo.py

NATIVE_CODE := $(shell git ls-files '*.cpp' '*.hpp' 2>/dev/null)
lint: setup ## ruff, mypy, import layers, the native code's format; .pre-commit-config.yaml calls it
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_CODE)

# CI adds --complete: a test that is skipped for want of anything but the machine fails the run. And a floor of coverage.
# Processes take file by file, in the order of folders: what a file's tests share is made once, and the quick files come last.
TEST_OPTIONS ?=
TEST_PROCESSES ?= 2
test: setup ## all tests in TEST_PROCESSES (2) processes, and the share of the code's branches that they take
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --cov --cov-report=term $(TEST_OPTIONS)

# The native extensions with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package: the one that is in
# use stays as it is. The interpreter's own leaks are not looked for; the replayed corpus's are. --sanitized has the tests
# refuse an extension without sanitizers, and --complete a run that leaves tests out; reports go past pytest to the terminal.
SANITIZE := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g
NATIVE_TESTS := tests/conformance $(wildcard tests/unit/test_native_*.py tests/unit/test_load_*.py tests/integration/test_load_*.py) \
  tests/integration/test_forward_kernels.py tests/integration/test_plans.py
sanitize: setup ## the native code's tests and the fuzzers' corpus under ASan and UBSan
	rm -rf $(SANITIZE) && mkdir -p $(SANITIZE)
	cp -rs $(CURDIR)/src $(SANITIZE)/src && rm -f $(SANITIZE)/src/narsil/*.so
	BUILD_NATIVE=1 BUILD_CXXFLAGS='$(SANITIZERS)' $(BIN)/python setup.py --quiet build_ext \
	  --build-temp $(SANITIZE)/objects --build-lib $(SANITIZE)/src
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZE)/src \
	  BUILD_CXXFLAGS='$(SANITIZERS)' \
	  $(BIN)/pytest -p no:cacheprovider --capture=sys --sanitized --complete -k 'not grpcio' $(NATIVE_TESTS)
	for target in decode session; do \
	  $(CXX) -std=c++17 -Wall -Wextra -Werror $(SANITIZERS) -Icsrc csrc/fuzz/$$target.cpp csrc/fuzz/replay.cpp $(FUZZED) -lnghttp2 \
	    -o $(SANITIZE)/$$target && $(SANITIZE)/$$target csrc/fuzz/corpus/$$target || exit 1; \
	done

FUZZ_SECONDS ?= 60
FUZZED := $(filter-out %/bindings.cpp %/plane.cpp %/poller.cpp %/sockets.cpp,$(wildcard csrc/native/*.cpp))
fuzz: fuzz-packages ## FUZZ_SECONDS of libFuzzer (clang) for each of the native parsers
	mkdir -p build/fuzz
	for target in decode session; do \
	  mkdir -p build/fuzz/$$target.corpus && \
	  clang++ -std=c++17 -Wall -Wextra -Werror -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -O1 -g -Icsrc \
	    csrc/fuzz/$$target.cpp $(FUZZED) -lnghttp2 -o build/fuzz/$$target && \
	  build/fuzz/$$target -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1 -verbosity=0 \
	    -artifact_prefix=build/fuzz/$$target. build/fuzz/$$target.corpus csrc/fuzz/corpus/$$target || exit 1; \
	done

MUTANT_SECONDS ?= 600
MUTANT_SEED ?= 1
mutants: setup ## plant faults in the core for MUTANT_SECONDS; the share that the unit tests notice
	$(BIN)/python -m tests.mutants --seconds $(MUTANT_SECONDS) --seed $(MUTANT_SEED)

bench: setup system-packages ## measure against the C++ server into benchmarks/results/MACHINE, render (20 minutes at most)
	$(BIN)/python benchmarks/bench.py

reports: setup ## render REPORTS.md and BENCHMARKS.md from benchmarks/results
	$(BIN)/python benchmarks/render_reports.py

clean: ## remove what the other targets made
	rm -rf $(VENV) build demo models src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/narsil/protos/descriptors.binpb src/narsil/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torchrec is wanted by the tests alone, and without its dependencies: the CUDA build of FBGEMM that it asks for would
# overwrite the CPU build.
PROTOS := $(shell find proto -name '*.proto')
NATIVE_SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.hpp csrc/*.hpp)
$(SETUP): pyproject.toml setup.py constraints.txt $(PROTOS) $(NATIVE_SOURCES) \
  | native-packages
	@$(PYTHON) -c 'import sys; sys.exit("Narsil needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt -e '.[cpu,onnx,bench,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt torchrec tensordict torchmetrics \
	  tqdm pyre-extensions pyvers cloudpickle importlib_metadata orjson typing_inspect
	# Triton's client asks for an older protobuf than the tests do, and runs with theirs. What it needs for HTTP follows.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt tritonclient python-rapidjson
	$(BIN)/python -m pip install --quiet --constraint constraints.txt geventhttpclient aiohttp
	@$(BIN)/python -c 'from narsil.extension import MISSING; MISSING and print("without the native data plane:", MISSING)'
	@touch $@

# Debian packages: as root they are installed, otherwise named. Without the first, grpcio serves and loads; without the
# baseline's, the C++ baseline's row is left out; without the tests', those with other projects' clients are skipped.
NATIVE_PACKAGES := g++ libnghttp2-dev
FUZZ_PACKAGES := clang libclang-rt-dev libnghttp2-dev
TEST_PACKAGES := nghttp2-client libgrpc++-dev pkg-config
BASELINE_PACKAGES := g++ cmake ninja-build pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc

define install_packages
@missing=$$(comm -23 <(printf '%s\n' $(1) | sort) \
  <(dpkg-query -W -f '$${db:Status-Status} $${Package}\n' $(1) 2>/dev/null \
    | awk '$$1 == "installed" {print $$2}' | sort) | xargs); \
if [ -z "$$missing" ]; then exit 0; fi; \
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  echo "installing for $(2): $$missing"; \
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing) >/dev/null 2>&1 \
    || echo "could not install $$missing: going on without $(2)"; \
else echo "missing: $$missing; going on without $(2)"; fi
endef

fuzz-packages:
	$(call install_packages,$(FUZZ_PACKAGES),fuzzing)

test-packages:
	$(call install_packages,$(TEST_PACKAGES),the tests with h2load and with a C++ client)

native-packages:
	$(call install_packages,$(NATIVE_PACKAGES),the native data plane)

system-packages:
	$(call install_packages,$(BASELINE_PACKAGES),the C++ baseline)
