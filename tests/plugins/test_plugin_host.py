# SPDX-License-Identifier: Apache-2.0
"""The plugins driven by a minimal host, as TensorRT drives them: up to enqueue anywhere, enqueue on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from .native import LIBRARY, PLUGINS, WARNINGS, compile_cpp, header_folder

SKIPPED = 77


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensorrt = header_folder("NvInferRuntime.h", "kernel_lens/include/tensorrt")
    cuda = header_folder("cuda_runtime_api.h", "nvidia/cu13/include")
    folders = [cuda.parent / name for name in ("lib", "lib64")]
    runtime = next((f for folder in folders if (f := folder / "libcudart_static.a").exists()), None)
    if runtime is None:
        pytest.skip(f"libcudart_static.a is not installed beside {cuda}")
    options = [*WARNINGS, "-O1", "-isystem", str(tensorrt), "-isystem", str(cuda), str(runtime)]
    output = tmp_path_factory.mktemp("host") / "plugin_host"
    return compile_cpp(PLUGINS / "tests/plugin_host.cpp", output, *options, "-ldl", "-lpthread", "-lrt")


def run(host: Path, library: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(host), str(library)], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def done(host: Path) -> subprocess.CompletedProcess[str]:
    """The built library's run."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built (cmake -S plugins -B build/plugin)")
    return run(host, LIBRARY)


def test_every_plugin_is_built_and_restored_as_tensorrt_does_it(
    done: subprocess.CompletedProcess[str],
) -> None:
    lines = done.stdout.splitlines()
    assert done.returncode in (0, SKIPPED), done.stdout[-4000:] + done.stderr[-1000:]
    assert not [line for line in lines if line.startswith("FAIL")]
    assert lines[-1].endswith(", 0 failed")
    built = {line.split(":")[0] for line in lines if line.endswith(": serializes to the same fields")}
    assert any(line.startswith("PASS LynxSparseLinear bf16") for line in built)
    assert any(line.startswith("PASS LynxSparseLinear fp16") for line in built)
    assert any(line.startswith("PASS LynxNormFp8SparseWeightLinear bf16") for line in built)


def test_enqueue_on_a_gpu(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode == SKIPPED:
        pytest.skip("no CUDA device was found: nothing was enqueued")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "two contexts on two streams" in done.stdout and "CUDA graph" in done.stdout
    if ctypes.CDLL(str(LIBRARY)).lynx_fp8_runs(0):
        assert (
            "PASS LynxNormFp8SparseWeightLinear bf16 66 x 208 -> 72: tactic 1 against float64" in done.stdout
        )


@pytest.mark.parametrize("what", ["missing", "other"])
def test_what_is_no_plugin_library_is_refused(host: Path, tmp_path: Path, what: str) -> None:
    library = tmp_path / "lib.so"
    if what == "other":
        source = tmp_path / "empty.cpp"
        source.write_text("")
        compile_cpp(source, library, "-shared", "-fPIC")
    done = run(host, library)
    assert done.returncode == 2
    assert str(library) in done.stderr and (
        "make plugin" in done.stderr or "liblynx_plugin.so" in done.stderr
    )


def test_timing_cache_ids_name_the_build(done: subprocess.CompletedProcess[str]) -> None:
    """Times taken with other kernels or tiles must not be found again."""
    notes = subprocess.run(["readelf", "-n", LIBRARY], capture_output=True, text=True, check=True).stdout
    build_id = next(line.split()[-1] for line in notes.splitlines() if "Build ID" in line)
    ids = [line for line in done.stdout.splitlines() if "built by 8 host threads at once" in line]
    assert ids and all(build_id in line for line in ids)


def test_a_stale_library_fails(host: Path, tmp_path: Path) -> None:
    """One without an attribute that the op has today: to skip it would pass a build that nobody made."""
    source = tmp_path / "stale.cpp"
    source.write_text(STALE)
    tensorrt = header_folder("NvInferRuntime.h", "kernel_lens/include/tensorrt")
    cuda = header_folder("cuda_runtime_api.h", "nvidia/cu13/include")
    options = ["-shared", "-fPIC", "-w", f"-I{tensorrt}", f"-I{cuda}"]
    done = run(host, compile_cpp(source, tmp_path / "stale.so", *options))
    assert done.returncode == 1 and "SKIP" not in done.stdout
    assert "another version; build it again with: make plugin" in done.stdout


STALE = """
#include <NvInferRuntime.h>
struct Creator : nvinfer1::IPluginCreatorV3One {
  nvinfer1::PluginField field{"metadata_layout", nullptr, nvinfer1::PluginFieldType::kINT32, 1};
  nvinfer1::PluginFieldCollection fields{1, &field};
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection*,
                                    nvinfer1::TensorRTPhase) noexcept override { return nullptr; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields; }
  const char* getPluginName() const noexcept override { return "LynxSparseWeightLinear"; }
  const char* getPluginVersion() const noexcept override { return "1"; }
  const char* getPluginNamespace() const noexcept override { return "lynx"; }
};
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static Creator creator;
  static nvinfer1::IPluginCreatorInterface* const all[] = {&creator};
  count = 1;
  return all;
}
extern "C" void setLoggerFinder(void*) {}
extern "C" int lynx_holds(int, int) { return 1; }
"""
