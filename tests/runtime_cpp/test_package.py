# SPDX-License-Identifier: Apache-2.0
"""The CMake package: installed, moved elsewhere, found by a program of its own, which then runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lynx_compile.engine import trt
from tests.plugins.native import header_folder
from tests.runtime_cpp.conftest import BUILD, ROOT, output, run

BIN = Path(sys.prefix) / "bin"
CONSUMER = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES CXX)
find_package(LynxCompile WANTED REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE LynxCompile::runtime)
"""
MAIN = """
#include <lynx/engine.h>
#include <cstdio>

int main(int, char** argv) {
  try {
    lynx::Engine::open(argv[1]);
  } catch (const lynx::Error& error) {
    return std::printf("%s|%s", error.cause().c_str(), error.remedy().c_str()), 3;
  }
  return 0;
}
"""


def cmake(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """CMake with the toolchain's packages hidden: a program needs none of them but what the package names."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(BIN / "cmake"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def prefix(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is, not where it was installed."""
    folder = tmp_path_factory.mktemp("package")
    output(BIN / "cmake", "--install", BUILD, "--prefix", folder / "installed")
    return (folder / "installed").rename(folder / "moved")


def configure(source: Path, build: Path, prefix: Path, *options: str) -> subprocess.CompletedProcess[str]:
    ninja = f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}"
    return cmake("-S", source, "-B", build, "-G", "Ninja", ninja, f"-DCMAKE_PREFIX_PATH={prefix}", *options)


@pytest.fixture
def consumer(tmp_path: Path) -> Path:
    folder = tmp_path / "consumer"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(CONSUMER.replace("WANTED", "0.1"))
    (folder / "main.cpp").write_text(MAIN)
    return folder


def test_a_program_finds_builds_and_runs(prefix: Path, consumer: Path, tmp_path: Path) -> None:
    done = configure(consumer, tmp_path / "build", prefix)
    assert done.returncode == 0, done.stderr
    done = cmake("--build", tmp_path / "build")
    assert done.returncode == 0, done.stdout
    done = run(tmp_path / "build" / "consumer", "/nowhere/flux.engine")
    cause, _, remedy = done.stdout.partition("|")
    assert (done.returncode, cause) == (3, "The engine /nowhere/flux.engine does not exist.")
    assert remedy.startswith("Check the path")


def test_only_the_public_headers_are_installed(prefix: Path) -> None:
    headers = {path.relative_to(prefix / "include").as_posix() for path in prefix.rglob("*.h")}
    assert headers == {"lynx/engine.h", "lynx/safetensors.h"}


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("-DLYNX_TENSORRT_LIBRARY=/nowhere/libnvinfer.so", "point to it with -DLYNX_TENSORRT_LIBRARY="),
        ("-DLYNX_CUDART_STATIC=/nowhere/a.a", "point to it with -DLYNX_CUDART_STATIC="),
    ],
)
def test_what_is_missing_is_named(
    prefix: Path, consumer: Path, tmp_path: Path, option: str, reason: str
) -> None:
    done = configure(consumer, tmp_path / "build", prefix, option)
    assert done.returncode != 0 and reason in " ".join(done.stderr.split())


def test_another_version_is_not_taken(prefix: Path, consumer: Path, tmp_path: Path) -> None:
    (consumer / "CMakeLists.txt").write_text(CONSUMER.replace("WANTED", "9.0"))
    done = configure(consumer, tmp_path / "build", prefix)
    assert done.returncode != 0 and "0.1.0" in done.stderr


def test_examples_build_against_the_package(
    prefix: Path, programs: Path, tmp_path: Path, tiny_engine: Path
) -> None:
    """They are linked with TensorRT for RTX and the real CUDA runtime; where there is no GPU they say so."""
    headers = header_folder("NvInferRuntime.h", "kernel_lens/include/tensorrt")
    build = tmp_path / "build"
    done = configure(
        ROOT / "examples/cpp",
        build,
        prefix,
        f"-DLYNX_TENSORRT_INCLUDE_DIR={headers}",
        "-DCMAKE_CXX_FLAGS=-Werror",
    )
    assert done.returncode == 0, done.stderr
    done = cmake("--build", build)
    assert done.returncode == 0, done.stdout
    # TensorRT 10's headers, which are those at hand, are not those of TensorRT for RTX: the program notices.
    done = run(build / "plain_tensorrt", tiny_engine, "liblynx_plugin.so")
    assert (
        done.returncode == 3 and "built with the headers of TensorRT 10, linked with version 1" in done.stderr
    )
    if trt.gpu():
        pytest.skip("there is a GPU; without one, the examples say so")
    seed = tmp_path / "seed.safetensors"
    output(sys.executable, "-m", "calib.digits_flux.seed", seed)
    done = run(build / "digits", tiny_engine, seed, tmp_path / "x.png")
    assert done.returncode == 3 and done.stderr.startswith("error: No CUDA device was found")
    assert not (tmp_path / "x.png").exists()
