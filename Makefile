# make demo: from a clean clone to a TensorRT engine.  make test: the whole test suite.
# Needs python3 (3.11 or later, with venv), make and g++; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
# GPU architectures of the plugin and element types of its GEMMs. CI builds fewer; `make LYNX_CUDA_ARCHITECTURES=90a`
# builds for Hopper alone.
LYNX_CUDA_ARCHITECTURES ?= 80;86;89;90a;120
LYNX_ELEMENT_TYPES ?= bf16;fp16
BUILD := build/plugin
RUNTIME := build/runtime
CMAKE := PYTHONPATH=$(abspath $(VENV))/toolchain $(BIN)/cmake

.PHONY: demo test sanitize unit plugin runtime setup lint format clean

demo: setup plugin
	$(BIN)/lynx-compile engines/digits-flux.yaml -o engines/digits-flux.engine

test: setup plugin runtime
	@$(CMAKE) --build $(BUILD) -j $(JOBS)  # the plugin's own tests too
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	$(BIN)/ctest --test-dir $(RUNTIME) --output-on-failure
	$(BIN)/pytest

sanitize: plugin  ## needs a GPU and CUDA's compute-sanitizer
	@$(CMAKE) --build $(BUILD) -j $(JOBS) --target device_test
	compute-sanitizer --error-exitcode 1 --tool memcheck $(BUILD)/tests/device_test "bf16 33 x"
	compute-sanitizer --error-exitcode 1 --tool racecheck $(BUILD)/tests/device_test "bf16 33 x"

unit: setup plugin  ## what needs no TensorRT build and no trained model
	$(BIN)/pytest -m "not slow"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements/toolchain.txt requirements/tensorrt11.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11. Run: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: python3 has no venv. On Debian and Ubuntu run: apt install python3-venv"; exit 2; }
	@command -v g++ >/dev/null || { echo "error: g++ is missing. On Debian and Ubuntu run: apt install g++"; exit 2; }
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q --no-deps --target $(VENV)/toolchain --upgrade -r requirements/toolchain.txt
	$(BIN)/pip install -q --no-deps --target $(VENV)/trt11 --upgrade -r requirements/tensorrt11.txt
	$(BIN)/pip install -q cmake ninja scikit-build-core
	SKBUILD_WHEEL_CMAKE=false $(BIN)/pip install -q --no-build-isolation -e '.[rtx,dev]'
	@touch $@

# Ninja decides what to compile again; the library is linked into lynx_compile/lib, where the package looks for it.
plugin: setup
	@test -f $(BUILD)/build.ninja || $(CMAKE) -S plugins -B $(BUILD) -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python -DLYNX_BUILD_TESTS=ON \
	  "-DLYNX_CUDA_ARCHITECTURES=$(LYNX_CUDA_ARCHITECTURES)" "-DLYNX_ELEMENT_TYPES=$(LYNX_ELEMENT_TYPES)"
	@$(CMAKE) --build $(BUILD) -j $(JOBS) --target lynx_plugin rtx_alias

# The C++ runtime with its tests; `cmake --install build/runtime --prefix DIR` gives programs the package LynxCompile.
runtime: setup
	@test -f $(RUNTIME)/build.ninja || $(CMAKE) -S plugins/runtime -B $(RUNTIME) -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DLYNX_BUILD_RUNTIME_TESTS=ON
	@$(CMAKE) --build $(RUNTIME) -j $(JOBS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lynx_compile
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build lynx_compile/lib engines/*.engine engines/*.cache engines/*.json engines/*.onnx engines/*.safetensors engines/*.log engines/*.html engines/*.png
