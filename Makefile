# `make demo` and `make test` do everything on a fresh Linux machine with python3, g++ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

NATIVE_SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml
PYTHON_SOURCES := pyruntime tests benchmarks examples
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.h')

# What the build, the tests and the demo need, besides the package's own dependencies.
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja "nvidia-cuda-runtime>=13,<14" \
	"nvidia-cuda-crt>=13,<14"

.PHONY: demo test soak sanitize test-gpu bench bench-peers lint setup clean

setup: $(STAMPS)/adapter

demo: setup
	$(BIN)/python examples/demo.py

test: setup $(STAMPS)/stacks
	$(BIN)/python -m pytest -q -n auto

# Everything, with long samples: figures in notes come from here.
soak: setup $(STAMPS)/stacks
	SPILLOVER_SOAK=1 $(BIN)/python -m pytest -q -n auto --timeout 1200

# The stress programs of the pool, the trace and the optimizer under ThreadSanitizer and AddressSanitizer.
sanitize: setup
	$(BIN)/python tools/run_sanitizers.py

# On a machine with an NVIDIA GPU, in any environment that has torch: PYTHON=python make test-gpu
test-gpu: setup
	SPILLOVER_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

bench: setup
	$(BIN)/python -m benchmarks --all

# Installs the peers that benchmarks compare with.
bench-peers: | $(STAMPS)/packages
	$(BIN)/python tools/install_dependencies.py bench

lint: $(STAMPS)/lint $(STAMPS)/native
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --preset debug -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python > $(VENV)/lint-cmake.log
	$(BIN)/python tools/run_clang_tidy.py build/debug

clean:
	rm -rf build demo-report $(VENV)

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# The environment: torch (the CUDA build, also where there is no GPU) and our dependencies.
$(STAMPS)/packages: pyproject.toml | $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(BUILD_TOOLS)
	$(BIN)/python tools/install_dependencies.py torch test plots
	touch $@

# The stacks that tests run on the emulated device, and the peers of benchmarks. What cannot be
# installed is left out; this is tried once; remove the stamp to try again.
$(STAMPS)/stacks: pyproject.toml tools/install_dependencies.py | $(STAMPS)/packages
	$(BIN)/python tools/install_dependencies.py --optional stacks bench
	touch $@

$(STAMPS)/lint: pyproject.toml | $(STAMPS)/packages
	$(BIN)/python tools/install_dependencies.py lint
	touch $@

# The package itself, editable: Python files are used in place, C++ is built incrementally.
$(STAMPS)/native: $(NATIVE_SOURCES) | $(STAMPS)/packages
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# The parts that are compiled against the installed torch.
$(STAMPS)/adapter: $(STAMPS)/native $(STAMPS)/packages
	$(BIN)/spillover build
	touch $@
