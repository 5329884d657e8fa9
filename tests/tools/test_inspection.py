# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile inspect`` on a real engine: what it tells, and what it finds wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from lynx_compile import cli, pipeline
from lynx_compile.engine.manifest import Manifest
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.inspection import inspect

pytestmark = pytest.mark.slow
STAGES = ["capture", "calibrate", "compensate", "export", "rewrite", "build"]


@pytest.fixture
def engine(compiled_tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for path in compiled_tiny.parent.glob("tiny.[ejs]*"):
        shutil.copy(path, tmp_path)
    return tmp_path / compiled_tiny.name


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "inspect", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_table_names_all_that_is_inside(
    compiled_tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(compiled_tiny)) == 0
    shown = capsys.readouterr().out
    manifest = Manifest.read(compiled_tiny.with_suffix(".json"))
    names = [linear for node in manifest.sparse for linear in node.linears]
    names += [linear.linear for linear in manifest.dense] + [tensor.name for tensor in manifest.inputs]
    assert all(name in shown for name in names)
    assert {linear.reason for linear in manifest.dense} and all(
        x.reason[:40] in shown for x in manifest.dense
    )
    assert "10 found in the engine" in shown and "installed here" in shown and "embedded" in shown
    assert all(stage in shown for stage in STAGES)


def test_the_worst_layer_error_is_that_of_solved_and_of_tuned_weights(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine.with_suffix(".json")
    values = json.loads(path.read_text())
    tuned, solved, older = values["sparse"][:3]
    tuned["errors"], tuned["solved_errors"] = ([error] * len(tuned["linears"]) for error in (0.222, 0.111))
    solved["errors"] = solved["solved_errors"] = [0.333] * len(solved["linears"])
    older["errors"], older["solved_errors"] = [0.444] * len(older["linears"]), []
    path.write_text(json.dumps(values))
    assert run(monkeypatch, str(engine)) == 0
    shown = capsys.readouterr().out
    assert "0.111 solved, 0.222 tuned" in shown
    assert all(re.search(rf"B │ +{worst} │", shown) for worst in ("0.333 solved", "0.444"))


def test_fp8_layers_have_their_words(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine.with_suffix(".json")
    values = json.loads(path.read_text())
    for node, operand in zip(values["sparse"], ("weight", "activation", "none"), strict=False):
        node |= {"operand": operand, "fp8": True}
    path.write_text(json.dumps(values))
    assert run(monkeypatch, str(engine)) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("2:4 weights in FP8", "2:4 activations in FP8", "dense FP8"))
    assert Manifest.read(path).sparse[2].form == "dense FP8"


def test_json_holds_the_manifest_and_what_was_found(
    compiled_tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(compiled_tiny), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["manifest"] == json.loads(compiled_tiny.with_suffix(".json").read_text())
    assert (found["plugin_layers"], found["engine_bytes"]) == (10, compiled_tiny.stat().st_size)
    assert (found["installed_plugin"], found["problems"]) == ("same", [])
    with safe_open(compiled_tiny.with_suffix(".safetensors"), "np") as file:
        layer = found["manifest"]["sparse"][0]["layer"]
        names = [name for name in file.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118
        sizes = [file.get_tensor(name).nbytes for name in names]
    assert len(sizes) == 3
    assert found["weight_bytes"][layer] == sum(sizes)
    assert len(found["weight_bytes"]) == 10


def test_it_needs_neither_torch_nor_tensorrt(compiled_tiny: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lynx_compile.tools.inspection import inspect\n"
        "inspect(Path(sys.argv[1]))\n"
        "print([name for name in ('torch', 'tensorrt', 'tensorrt_rtx', 'diffusers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(compiled_tiny)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def swap(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "spoil", "message"),
    [
        (".json", Path.unlink, "tiny.json does not exist. Keep it beside the engine, or compile again."),
        (".json", cut, "tiny.json is cut off or no JSON"),
        (".engine", cut, "is not the engine of its manifest (1000 bytes"),
        (".engine", swap, "is not the engine of its manifest"),
        (".engine", lambda path: path.write_bytes(b"GIF89a"), "is no TensorRT engine"),
        (".engine", Path.unlink, "tiny.engine does not exist"),
    ],
)
def test_a_wrong_file_is_one_clear_error(
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(engine.with_suffix(suffix))
    assert run(monkeypatch, str(engine)) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert message in errors and errors.count("error:") == 1


def test_external_weights_are_checked(engine: Path) -> None:
    weights = engine.with_suffix(".safetensors")
    values = json.loads(engine.with_suffix(".json").read_text())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    tensors = [{"name": "a.weight", "dtype": "fp16", "shape": [8, 64]}]
    values["weights"] = {"mode": "external", "file": weights.name, "sha256": digest, "tensors": tensors}
    engine.with_suffix(".json").write_text(json.dumps(values))
    assert inspect(engine).problems == ()
    swap(weights)
    assert "does not hold the weights of this engine" in inspect(engine).problems[0]
    weights.unlink()
    (problem,) = inspect(engine).problems
    assert "cannot be read" in problem


def test_stages_are_recorded_and_remembered(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "tiny.yaml")
    (first,) = pipeline.compile(recipe, tmp_path / "tiny.engine")
    (again,) = pipeline.compile(recipe, tmp_path / "tiny.engine")
    assert [stage.name for stage in first.stages] == STAGES
    assert all(stage.seconds > 0 and not stage.reused for stage in first.stages)
    if Path("/proc/self/clear_refs").exists():
        assert all(stage.peak_bytes and stage.peak_bytes > 1 << 26 for stage in first.stages)
    assert again.stages == tuple(stage.model_copy(update={"reused": True}) for stage in first.stages)
