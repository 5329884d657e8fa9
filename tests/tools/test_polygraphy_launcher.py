# SPDX-License-Identifier: Apache-2.0
"""``lynx-polygraphy``: real commands of polygraphy on a real model, and the engine that must not come out dense."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from lynx_compile.engine.plan import read_plan
from lynx_compile.errors import StageError
from lynx_compile.files.float32 import float32_copy
from lynx_compile.tools.polygraphy_launcher import _check_engine

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(compiled_tiny: Path) -> Path:
    return compiled_tiny.with_suffix(".onnx")


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lynx_compile.tools.polygraphy_launcher", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_inspect_shows_the_lynx_nodes(model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "inspect", "model", str(model), "--show", "layers", "attrs")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\[Op: (lynx::)?LynxSparseWeightLinear\]", done.stdout)) == 10
    assert "Attributes.plugin_namespace" in done.stdout or "plugin_namespace" in done.stdout


def test_run_compares_the_dense_file_with_the_compiled_one(model: Path, tmp_path: Path) -> None:
    """In ONNX Runtime, as docs/tools.md shows it."""
    float32_copy(model.with_suffix(".cache") / "dense" / "dense.onnx", tmp_path / "dense32.onnx")
    float32_copy(model, tmp_path / "flux32.onnx")
    shown = re.findall(r"^lynx-polygraphy (run .*)$", (ROOT / "docs" / "tools.md").read_text(), re.MULTILINE)
    dense, compiled = (run(tmp_path, *line.split()) for line in shown)
    for done in (dense, compiled):
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout and "output.sample [dtype=float32, shape=(2, 64, 4)]" in done.stdout
    assert "PSNR: " in compiled.stdout and "PSNR: inf" not in compiled.stdout


def test_convert_builds_an_engine_with_every_plugin_layer(model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "convert", str(model), "--strongly-typed", "-o", "tiny.engine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("10 Lynx nodes became 10 plugin layers\n")
    assert read_plan(tmp_path / "tiny.engine").records == 10
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.engine"]


def test_a_node_that_does_not_become_a_plugin_is_refused(model: Path, tmp_path: Path) -> None:
    """TensorRT runs the function of the same name then, and polygraphy calls that a success."""
    spoiled = onnx.load(model)
    node = next(node for node in spoiled.graph.node if node.domain == "lynx")
    kept = [attribute for attribute in node.attribute if attribute.name != "plugin_namespace"]
    del node.attribute[:]
    node.attribute.extend(kept)
    onnx.save(spoiled, tmp_path / "spoiled.onnx")
    (tmp_path / "tiny.engine").write_bytes(b"an earlier engine")
    done = run(tmp_path, "convert", "spoiled.onnx", "--strongly-typed", "-o", "tiny.engine")
    assert done.returncode == 3
    assert f"the node '{node.name}' of spoiled.onnx does not ask for a plugin" in done.stderr
    assert (tmp_path / "tiny.engine").read_bytes() == b"an earlier engine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoiled.onnx", "tiny.engine"]


def test_an_engine_with_fewer_plugin_layers_is_refused(model: Path, tmp_path: Path) -> None:
    more = onnx.load(model, load_external_data=False)
    more.graph.node.append(next(node for node in more.graph.node if node.domain == "lynx"))
    onnx.save(more, tmp_path / "more.onnx")
    with pytest.raises(StageError, match="the engine holds 10 plugin layers, .*more.onnx has 11 Lynx nodes"):
        _check_engine(tmp_path / "more.onnx", model.with_suffix(".engine"))


def test_a_failed_conversion_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf" * 100)
    (tmp_path / "tiny.engine").write_bytes(b"an earlier engine")
    done = run(tmp_path, "convert", "broken.onnx", "-o", "tiny.engine")
    assert done.returncode != 0
    assert (tmp_path / "tiny.engine").read_bytes() == b"an earlier engine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", "tiny.engine"]


def test_debug_reduces_the_model(model: Path, tmp_path: Path) -> None:
    command = (
        "debug",
        "reduce",
        str(model),
        "-o",
        "reduced.onnx",
        "--min-good",
        "good.onnx",
        "--check",
        "true",
    )
    done = run(tmp_path, *command, "--mode", "bisect")
    assert done.returncode == 0, done.stdout + done.stderr
    reduced = onnx.load(tmp_path / "good.onnx", load_external_data=False)
    whole = onnx.load(model, load_external_data=False)
    assert 0 < len(reduced.graph.node) < len(whole.graph.node)


def test_what_needs_no_tensorrt_works_without(model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "inspect", "model", str(model), POLYGRAPHY_USE_TENSORRT_RTX="0")
    assert done.returncode == 0, done.stderr
    assert "output.sample" in done.stdout
    assert "warning: " in done.stderr and "What needs TensorRT fails" in done.stderr


def test_help_and_wrong_use_are_polygraphys(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: lynx-polygraphy")
    assert run(tmp_path, "convert").returncode == 2
    assert run(tmp_path, "no-such-tool").returncode == 2
