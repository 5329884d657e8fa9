# SPDX-License-Identifier: Apache-2.0
"""The manifest of a real engine, read back; and every way in which one can be spoiled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lynx_compile import __version__
from lynx_compile.engine import manifest as manifest_module
from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError
from lynx_compile.files.digest import written
from lynx_compile.passes.build import build
from lynx_compile.passes.describe import describe
from lynx_compile.passes.export import DenseOnnx
from lynx_compile.passes.rewrite import LynxOnnx
from lynx_compile.recipe import Engine, Recipe

WriteOnnx = Callable[..., LynxOnnx]


def described(lynx: LynxOnnx, output: Path, costs: str | None = None) -> Manifest:
    engine = {"backend": "tensorrt_rtx", "weights": "external" if lynx.external_inputs else "embedded"}
    recipe = Recipe.model_validate(
        {
            "model": {"source": "someone/model", "revision": "v1"},
            "call": {"height": 64, "width": 64},
            "calibration": {"prompts": "prompts.txt"},
            "engine": engine,
            "sparsity": {"costs": costs},
        }
    )
    checkpoint = SimpleNamespace(
        class_name="FluxTransformer2DModel", config={"in_channels": 4}, folder=output
    )
    dit: Any = SimpleNamespace(checkpoint=checkpoint, component="transformer", digest="ab" * 32)
    built = build(lynx, Engine.model_validate(engine), output)
    files = {path.name: written(path) for path in (lynx.path, lynx.weights_path)}
    return describe(recipe, dit, DenseOnnx(lynx.path), lynx, built, files)


@pytest.fixture
def manifest(lynx: LynxOnnx, tmp_path: Path) -> Manifest:
    return described(lynx, tmp_path / "small.engine")


@pytest.fixture
def path(manifest: Manifest, tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    manifest.write(path)
    return path


def test_round_trip(manifest: Manifest, path: Path, tmp_path: Path) -> None:
    assert Manifest.read(path) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "onnx", "small.engine", "small.json", "small.liblynx_plugin.so",
    ]  # fmt: skip


def test_it_tells_what_is_there(manifest: Manifest, lynx: LynxOnnx, tmp_path: Path) -> None:
    data = (tmp_path / "small.engine").read_bytes()
    values = manifest.model_dump()
    assert values["compiler"] == __version__
    assert values["engine"] == {
        "file": "small.engine",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert values["backend"]["name"] == "tensorrt_rtx"
    assert (values["plugin"]["library"], values["plugin"]["namespace"]) == (
        "small.liblynx_plugin.so",
        "lynx",
    )
    assert (tmp_path / "small.liblynx_plugin.so").read_bytes() == (trt.LIBRARIES / trt.LIBRARY).read_bytes()
    assert values["plugin"]["names"] == ("LynxSparseLinear",)
    assert {node["operand"] for node in values["sparse"]} == {"activation"}
    assert values["plugin_layers"] == 2
    assert values["weights"] == {"mode": "embedded", "file": None, "sha256": None, "tensors": ()}
    assert [tensor["name"] for tensor in values["inputs"]] == ["x"]
    assert [(node["layer"], node["rank"]) for node in values["sparse"]] == [(name, 16) for name in lynx.nodes]
    assert values["dense"] == ({"linear": "blocks.9.proj", "reason": "excluded by the recipe"},)
    assert values["source"] == {
        "model": "someone/model",
        "subfolder": "transformer",
        "revision": "v1",
        "family": "FluxTransformer2DModel",
        "config": {"in_channels": 4},
        "sha256": "ab" * 32,
        "loras": (),
    }


def test_errors_of_solved_weights_stand_beside_those_of_tuned_ones(
    lynx: LynxOnnx, path: Path, tmp_path: Path
) -> None:
    tuned, solved = (
        replace(node, errors=errors, solved_errors=(0.1,))
        for node, errors in zip(lynx.sparse, ((0.2,), (0.1,)), strict=True)
    )
    manifest = described(replace(lynx, sparse=(tuned, solved)), tmp_path / "tuned.engine")
    assert [(node.solved_errors, node.errors) for node in manifest.sparse] == [
        ((0.1,), (0.2,)), ((0.1,), (0.1,)),
    ]  # fmt: skip
    values = json.loads(path.read_text())
    for node in values["sparse"]:
        del node["solved_errors"]
    path.write_text(json.dumps(values))
    assert all(node.solved_errors == () for node in Manifest.read(path).sparse), "an older one reads"
    values["sparse"][0]["solved_errors"] = [0.1, 0.1]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="there is not one error for each linear"):
        Manifest.read(path)


def test_external_weights_are_named_and_are_no_inputs(write_onnx: WriteOnnx, tmp_path: Path) -> None:
    lynx = write_onnx(tmp_path / "onnx", external=True)
    manifest = described(lynx, tmp_path / "small.engine")
    assert [tensor.name for tensor in manifest.inputs] == ["x"]
    assert {tensor.name for tensor in manifest.weights.tensors} == set(lynx.external_inputs)
    assert (manifest.weights.mode, manifest.weights.file) == ("external", "model.safetensors")
    assert manifest.weights.sha256 == hashlib.sha256(lynx.weights_path.read_bytes()).hexdigest()


def test_expected_gain_is_that_of_the_whole_time(lynx: LynxOnnx, manifest: Manifest, tmp_path: Path) -> None:
    assert manifest.gain is None and manifest.costs is None and "expected" not in manifest.summary()
    slow, fast = (
        replace(node, tokens=100, gain=gain) for node, gain in zip(lynx.sparse, (1.0, 2.0), strict=True)
    )
    measured = replace(lynx, sparse=(slow, fast))
    costed = described(measured, tmp_path / "costed.engine", costs="../bench/gpu.json")
    assert costed.gain == pytest.approx(2 / (1 / 1.0 + 1 / 2.0)), "both nodes have as many products"
    assert "expected 1.33x on the sparse linears (gpu.json)" in costed.summary()
    assert [(node.tokens, node.gain) for node in costed.sparse] == [(100, 1.0), (100, 2.0)]
    partly = described(replace(lynx, sparse=(replace(slow, gain=None), fast)), tmp_path / "partly.engine")
    assert partly.gain == 2.0


def test_summary_counts(manifest: Manifest) -> None:
    assert "2 linears in 2 plugin layers, 1 dense" in manifest.summary()
    assert f"small.engine: {manifest.engine.bytes / 1e6:.1f} MB" in manifest.summary()


def change(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(values: dict[str, Any]) -> None:
        *sections, last = key.split(".")
        for section in sections:
            values = values[section]
        values[last] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("format_version", 1), "no manifest of format version 2 \\(but of 1\\)"),
        (change("surprise", 1), "'surprise' is wrong \\(Extra inputs"),
        (change("engine.surprise", 1), "'engine.surprise' is wrong"),
        (change("plugin_layers", "2"), "'plugin_layers' is wrong"),
        (change("plugin_layers", -1), "'plugin_layers' is wrong"),
        (change("engine.sha256", "abc"), "'engine.sha256' is wrong"),
        (change("engine.file", "../small.engine"), "'engine.file' is wrong"),
        (change("engine.file", ".."), "'engine.file' is wrong"),
        (change("engine.file", "/etc/passwd"), "'engine.file' is wrong"),
        (change("backend.name", "onnxruntime"), "'backend.name' is wrong"),
        (lambda values: values.pop("plugin"), "'plugin' is wrong \\(Field required"),
    ],
)
def test_wrong_values_are_named(path: Path, spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    values = json.loads(path.read_text())
    spoil(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        Manifest.read(path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"format_version": 2'])
def test_what_is_no_manifest_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cut off or no JSON|no manifest of format version"):
        Manifest.read(path)


def test_cut_off_anywhere(path: Path) -> None:
    text = path.read_text()
    for length in range(0, len(text) - 2, 97):
        path.write_text(text[:length])
        with pytest.raises(InputError, match="cut off"):
            Manifest.read(path)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Manifest.read(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.read(tmp_path)


def test_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "LARGEST_BYTES", 1 << 10)
    with pytest.raises(InputError, match="is larger than"):
        Manifest.read(path)
