# make demo: from a clean clone to a TensorRT engine.  make test: the whole test suite.
# Needs python3 (3.11 or later, with venv), make and g++; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
# What `make plugin` compiles: machine code for these GPUs, and PTX that serves newer ones; GEMMs for these types.
# `make plugin LYNX_CUDA_ARCHITECTURES=90a` builds for Hopper alone.
LYNX_CUDA_ARCHITECTURES ?= 80;86;89;90a;120
LYNX_ELEMENT_TYPES ?= bf16;fp16
# Tile configurations of the FP8 GEMMs: all, or one of each operand.
LYNX_FP8_TILES ?= all
# GPUs whose FP8 GEMMs go by mma: of these, sm_89 and sm_120; PTX serves all after sm_89.
LYNX_FP8_ARCHITECTURES ?= $(LYNX_CUDA_ARCHITECTURES)
# Those of the types that get Hopper's own instructions; the others run there as on any GPU.
LYNX_SM90_ELEMENT_TYPES ?= $(LYNX_ELEMENT_TYPES)
# Tile configurations of those GEMMs there: all, or one of each operand.
LYNX_SM90_TILES ?= all
# `make test` tests that library where it was built; else it compiles one for both kinds of GEMM and both types.
TEST_ARCHITECTURES ?= 80;90a
TEST_TYPES ?= bf16;fp16
TEST_SM90_TYPES ?= bf16
TEST_SM90_TILES ?= one
TEST_FP8_TILES ?= one
TEST_FP8_ARCHITECTURES ?= 89
TEST_BUILD := $(if $(wildcard build/plugin/build.ninja),build/plugin,build/test)
# `make demo` takes that one where it is there; else what its fp16 model needs: PTX, and the GPU of this machine.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . | sed s/^90$$/90a/)
DEMO_ARCHITECTURES := $(if $(filter 86 89 90a 120,$(GPU)),80;$(GPU),80)
DEMO_BUILD := $(if $(wildcard build/plugin/build.ninja),build/plugin,build/demo)
RUNTIME := build/runtime
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
CMAKE := PYTHONPATH=$(abspath $(VENV))/toolchain $(BIN)/cmake

.PHONY: demo test nightly support sanitize unit plugin plugin-demo plugin-test wheel runtime setup lint docs format clean

demo: plugin-demo
	$(BIN)/lynx-compile engines/demo.yaml -o engines/demo.engine
	$(BIN)/lynx-compile compare engines/demo.engine
	@echo "Emoji drawn by the dense model and by the compiled one, side by side: engines/demo.compare.png"

test: plugin-test runtime
	@$(CMAKE) --build $(TEST_BUILD) -j $(JOBS)  # the plugin's own tests too
	$(BIN)/ctest --test-dir $(TEST_BUILD) -j $(JOBS) --output-on-failure
	$(BIN)/ctest --test-dir $(RUNTIME) -j $(JOBS) --output-on-failure
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder  # tests/conftest.py has the order

# device_test: the pruning pass; plugin_host: producers, sparse weights and stream-K besides, in every tactic.
nightly: plugin-test  ## what proves little for its time: deliberate faults in the kernels, one by one
	$(BIN)/pytest -m nightly

support: plugin-test  ## every transformer class of diffusers through the compiler, into docs/support.md; resumable
	$(BIN)/python -m tests.support

sanitize: plugin-test  ## needs a GPU and CUDA's compute-sanitizer
	@$(CMAKE) --build $(TEST_BUILD) -j $(JOBS) --target device_test plugin_host
	compute-sanitizer --error-exitcode 1 --tool memcheck $(TEST_BUILD)/tests/device_test "bf16 33 x"
	compute-sanitizer --error-exitcode 1 --tool racecheck $(TEST_BUILD)/tests/device_test "bf16 33 x"
	compute-sanitizer --error-exitcode 1 --tool memcheck $(TEST_BUILD)/tests/plugin_host $(TEST_BUILD)/liblynx_plugin.so
	compute-sanitizer --error-exitcode 1 --tool synccheck $(TEST_BUILD)/tests/plugin_host $(TEST_BUILD)/liblynx_plugin.so
	compute-sanitizer --error-exitcode 1 --tool racecheck $(TEST_BUILD)/tests/plugin_host \
	  $(TEST_BUILD)/liblynx_plugin.so "bf16 66 x 192 -> 192, rank 16, norm scale"  # it is slow

unit: plugin-test  ## what needs no TensorRT build and no trained model
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

# Everything that is shipped: an hour or so on two cores. The library goes to lynx_compile/lib, where the package looks for it.
plugin: setup
	$(call build_plugin,build/plugin,$(LYNX_CUDA_ARCHITECTURES),$(LYNX_ELEMENT_TYPES),$(LYNX_SM90_ELEMENT_TYPES),$(LYNX_SM90_TILES),$(LYNX_FP8_TILES),$(LYNX_FP8_ARCHITECTURES))

# The package with that library, for every Linux whose glibc is as new as this one's: build/wheel/*manylinux*.whl
wheel: plugin
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w build/wheel . -C build-dir=build/wheel/cmake \
	  -C cmake.define.LYNX_PREBUILT=$(abspath lynx_compile/lib)

plugin-test: setup
	$(call build_plugin,$(TEST_BUILD),$(TEST_ARCHITECTURES),$(TEST_TYPES),$(TEST_SM90_TYPES),$(TEST_SM90_TILES),$(TEST_FP8_TILES),$(TEST_FP8_ARCHITECTURES))

plugin-demo: setup
	$(call build_plugin,$(DEMO_BUILD),$(DEMO_ARCHITECTURES),fp16,fp16,all,one,)

# folder, architectures, types, of them for sm_90a, tiles there, FP8 tiles, GPUs for FP8 by mma: configured once, then Ninja decides what to compile again.
define build_plugin
@test -f $(1)/build.ninja || $(CMAKE) -S plugins -B $(1) -G Ninja --log-level=WARNING \
  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python -DLYNX_BUILD_TESTS=ON \
  "-DLYNX_CUDA_ARCHITECTURES=$(2)" "-DLYNX_ELEMENT_TYPES=$(3)" "-DLYNX_SM90_ELEMENT_TYPES=$(4)" "-DLYNX_SM90_TILES=$(5)" \
  "-DLYNX_FP8_TILES=$(6)" "-DLYNX_FP8_ARCHITECTURES=$(7)" -DLYNX_COPY_IN_TREE=OFF
@$(CMAKE) --build $(1) -j $(JOBS) --target lynx_plugin rtx_alias
@mkdir -p lynx_compile/lib/rtx_alias && cp -p $(1)/liblynx_plugin.so lynx_compile/lib/ && \
  cp -p $(1)/rtx_alias/libtensorrt_rtx.so lynx_compile/lib/rtx_alias/
endef

# The C++ runtime with its tests; `cmake --install build/runtime --prefix DIR` gives programs the package LynxCompile.
runtime: setup
	@test -f $(RUNTIME)/build.ninja || $(CMAKE) -S plugins/runtime -B $(RUNTIME) -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DLYNX_BUILD_RUNTIME_TESTS=ON
	@$(CMAKE) --build $(RUNTIME) -j $(JOBS)

docs: setup  ## the site of docs/, into build/docs; docs/recipe.md is written from the recipe's model
	$(BIN)/python -m docs.recipe_reference
	$(MKDOCS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lynx_compile
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(MKDOCS)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build lynx_compile/lib engines/*.engine engines/*.cache engines/*.json engines/*.onnx engines/*.safetensors engines/*.log engines/*.html engines/*.png
