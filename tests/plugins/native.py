# SPDX-License-Identifier: Apache-2.0
"""Compiles the C++ host tests with g++ and finds the headers and libraries they need."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
LIBRARY = PLUGINS.parent / "lynx_compile" / "lib" / "liblynx_plugin.so"
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compile_cpp(source: Path, output: Path, *options: str) -> Path:
    """Compile one file of plugins/tests; skips the test where there is no g++."""
    require_gxx()
    command = [
        "g++",
        "-std=c++17",
        "-ffp-contract=off",
        f"-I{PLUGINS}",
        str(source),
        "-o",
        str(output),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return output


def require_gxx() -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")


def run_native(program: Path) -> None:
    """Run a C++ test; every line it prints begins with PASS or FAIL, but for the summary."""
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 0 and not failures, done.stdout[-4000:] + done.stderr
    assert done.stdout.rstrip().endswith(", 0 failed")


def header_folder(header: str, *suffixes: str) -> Path:
    """The folder with ``header``: one of ``suffixes`` among the installed packages, or /usr/local/cuda."""
    entries = [
        Path(sys.prefix) / "toolchain",
        *(Path(entry) for entry in sys.path if entry),
    ]  # first: `make setup`
    candidates = [entry / suffix for entry in entries for suffix in suffixes]
    for folder in [*candidates, Path("/usr/local/cuda/include")]:
        if (folder / header).exists():
            return folder
    pytest.skip(f"{header} is not installed (pip install --no-deps -r requirements/toolchain.txt)")
