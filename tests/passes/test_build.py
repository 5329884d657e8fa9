# SPDX-License-Identifier: Apache-2.0
"""Real builds with TensorRT for RTX, which needs no GPU: what comes out, and that every failure is loud."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file

from lynx_compile import recipe
from lynx_compile.engine.plan import Plan, _Search
from lynx_compile.errors import LynxError, StageError
from lynx_compile.passes import build as build_module
from lynx_compile.passes.build import build
from lynx_compile.passes.rewrite import LynxOnnx

pytestmark = pytest.mark.slow

RTX = recipe.Engine(backend="tensorrt_rtx")
OLD = b"the engine of an earlier build"
WriteOnnx = Callable[..., LynxOnnx]
Script = Callable[[str, LynxOnnx, Path], list[str]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where an engine of an earlier build is."""
    path = tmp_path / "out" / "small.engine"
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


def assert_untouched(output: Path) -> None:
    assert output.read_bytes() == OLD
    assert list(output.parent.iterdir()) == [output], "a temporary file was left behind"


def test_engine_holds_every_node(lynx: LynxOnnx, output: Path) -> None:
    built = build(lynx, RTX, output)
    data = output.read_bytes()
    assert (built.bytes, built.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert built.plugin_layers == 2
    assert built.gpus == ("sm80", "sm86", "sm89", "sm120")
    assert [(t.name, t.dtype, t.shape) for t in built.inputs] == [("x", "bf16", (1, 32, 64))]
    assert [(t.name, t.dtype, t.shape) for t in built.outputs] == [
        ("blocks.1.proj.relu", "bf16", (1, 32, 64))
    ]
    assert sorted(output.parent.iterdir()) == [output, built.plugin]


def test_plugin_library_is_embedded(lynx: LynxOnnx, output: Path) -> None:
    built = build(lynx, RTX, output)
    assert built.plugin_embedded
    assert built.plugin.read_bytes() in output.read_bytes()


def test_a_library_that_is_not_embedded_is_seen(
    lynx: LynxOnnx, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest says what the engine holds, not what the builder was asked for."""
    config = build_module._config

    def without_library(*arguments: Any) -> Any:
        made = config(*arguments)
        made.plugins_to_serialize = []
        return made

    monkeypatch.setattr(build_module, "_config", without_library)
    built = build(lynx, RTX, output)
    assert not built.plugin_embedded
    assert built.plugin.read_bytes() not in output.read_bytes()


def test_builds_are_bit_identical(lynx: LynxOnnx, output: Path, tmp_path: Path, script: Script) -> None:
    first = build(lynx, RTX, output)
    moved = shutil.copytree(lynx.path.parent, tmp_path / "elsewhere") / lynx.path.name
    code = "print(build(lynx, recipe.Engine(backend='tensorrt_rtx'), output).sha256)"
    command = script(code, replace(lynx, path=moved), tmp_path / "second.engine")
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout.strip() == first.sha256


@pytest.mark.parametrize(("gpus", "layers"), [(("sm86",), 1), (("sm80", "sm86", "sm89", "sm120"), 5)])
def test_layers_are_counted_for_any_targets(
    write_onnx: WriteOnnx, output: Path, gpus: tuple[str, ...], layers: int
) -> None:
    lynx = write_onnx(output.parent.parent / "onnx", widths=(64,) * (layers + 1), rank=0)
    built = build(lynx, recipe.Engine(backend="tensorrt_rtx", gpus=gpus), output)
    assert (built.plugin_layers, built.gpus) == (layers, gpus)


def test_external_weights_are_engine_inputs(write_onnx: WriteOnnx, tmp_path: Path) -> None:
    embedded = build(write_onnx(tmp_path / "a"), RTX, tmp_path / "a.engine")
    lynx = write_onnx(tmp_path / "b", external=True)
    external = build(lynx, RTX, tmp_path / "b.engine")
    assert external.plugin_layers == 2
    shapes = {tensor.name: tensor.shape for tensor in external.inputs}
    stored = load_file(lynx.weights_path)
    assert set(stored) == set(lynx.external_inputs)
    assert shapes == {"x": (1, 32, 64)} | {name: tuple(tensor.shape) for name, tensor in stored.items()}
    values = stored["blocks.0.proj.weight"][:4].view(torch.int16).numpy().tobytes()
    assert values in embedded.path.read_bytes()
    assert values not in external.path.read_bytes()
    assert embedded.bytes - external.bytes > 0.8 * lynx.weights_path.stat().st_size


def test_progress_is_tensorrts(lynx: LynxOnnx, output: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    build(lynx, RTX, output, progress=lambda *step: steps.append(step))
    assert "Building engine" in {phase for phase, _, _ in steps}
    assert all(1 <= done <= total for _, done, total in steps)


def test_failing_progress_ends_the_build(lynx: LynxOnnx, output: Path) -> None:
    def fail(*step: object) -> None:
        raise ValueError("the display broke")

    with pytest.raises(ValueError, match="the display broke"):
        build(lynx, RTX, output, progress=fail)
    assert_untouched(output)


def lose_weights(lynx: LynxOnnx) -> None:
    lynx.weights_path.unlink()


def cut_weights(lynx: LynxOnnx) -> None:
    lynx.weights_path.write_bytes(lynx.weights_path.read_bytes()[:20000])


def cut_onnx(lynx: LynxOnnx) -> None:
    lynx.path.write_bytes(lynx.path.read_bytes()[:3000])


def empty_onnx(lynx: LynxOnnx) -> None:
    lynx.path.write_bytes(b"")


def garble_onnx(lynx: LynxOnnx) -> None:
    lynx.path.write_bytes(b"no protobuf at all" * 100)


def lose_onnx(lynx: LynxOnnx) -> None:
    lynx.path.unlink()


def lose_namespace(lynx: LynxOnnx) -> None:
    """TensorRT then runs the model-local function instead of the plugin, without a word."""
    edit(lynx, lambda graph: remove_attribute(graph.node[0], "plugin_namespace"))


def change_namespace(lynx: LynxOnnx) -> None:
    edit(lynx, lambda graph: set_string(graph.node[0], "plugin_namespace", b"other"))


def change_version(lynx: LynxOnnx) -> None:
    edit(lynx, lambda graph: set_string(graph.node[0], "plugin_version", b"2"))


def add_unknown_node(lynx: LynxOnnx) -> None:
    """One plugin layer more than the rewrite has reported."""
    edit(lynx, lambda graph: copy_first_node(graph, used=True))


def add_dead_node(lynx: LynxOnnx) -> None:
    edit(lynx, lambda graph: copy_first_node(graph, used=False))


FAILURES = [
    (lose_weights, r"cannot parse .*Failed to open file: .*model\.safetensors"),
    (cut_weights, r"cannot parse .*out of range for file"),
    (cut_onnx, r"cannot parse .*Failed to parse the ONNX model"),
    (empty_onnx, r"0 of 2 Lynx nodes became plugin layers"),
    (garble_onnx, r"cannot parse .*Failed to parse the ONNX model"),
    (lose_onnx, r"cannot parse .*cannot be found"),
    (lose_namespace, r"1 of 2 Lynx nodes became plugin layers \(blocks\.0\.proj did not\)"),
    (change_namespace, r"1 of 2 Lynx nodes became plugin layers \(blocks\.0\.proj did not\)"),
    (change_version, r"1 of 2 Lynx nodes became plugin layers \(blocks\.0\.proj did not\)"),
    (add_unknown_node, r"3 of 2 Lynx nodes became plugin layers"),
]


@pytest.mark.parametrize(("spoil", "message"), FAILURES, ids=[spoil.__name__ for spoil, _ in FAILURES])
def test_spoiled_input_is_refused(
    lynx: LynxOnnx, output: Path, spoil: Callable[[LynxOnnx], None], message: str
) -> None:
    spoil(lynx)
    with pytest.raises(StageError, match=message):
        build(lynx, RTX, output)
    assert_untouched(output)


def test_wrong_width_is_refused_in_the_plugins_words(
    write_onnx: WriteOnnx, tmp_path: Path, output: Path
) -> None:
    lynx = write_onnx(tmp_path / "onnx", extra_columns=8)
    with pytest.raises(StageError, match="weight has 136 columns where 128 are due"):
        build(lynx, RTX, output)
    assert_untouched(output)


def test_layer_that_the_builder_removes_is_missed(lynx: LynxOnnx, output: Path) -> None:
    """The network holds the layer, the finished engine does not."""
    add_dead_node(lynx)
    reported = LynxOnnx(
        lynx.path, lynx.weights_path, (), (*lynx.sparse, replace(lynx.sparse[0], name="twin")), lynx.dense
    )
    with pytest.raises(StageError, match="the finished engine holds 2 of 3 plugin layers"):
        build(reported, RTX, output)
    assert_untouched(output)


def test_unbound_external_weight_is_refused(lynx: LynxOnnx, output: Path) -> None:
    reported = LynxOnnx(lynx.path, lynx.weights_path, ("blocks.0.proj.weight",), lynx.sparse, lynx.dense)
    with pytest.raises(StageError, match=r"the weight blocks\.0\.proj\.weight is no input"):
        build(reported, RTX, output)
    assert_untouched(output)


def test_withheld_plugin_is_noticed(lynx: LynxOnnx, output: Path, script: Script) -> None:
    code = "trt.load_plugin = lambda *_: None\nbuild(lynx, recipe.Engine(backend='tensorrt_rtx'), output)"
    done = subprocess.run(script(code, lynx, output), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "0 of 2 Lynx nodes became plugin layers (blocks.0.proj did not)" in done.stderr
    assert_untouched(output)


def test_unwritable_folder_is_refused_before_the_build(lynx: LynxOnnx, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    steps: list[object] = []
    with pytest.raises(LynxError, match="could not be written"):
        build(lynx, RTX, tmp_path / "file" / "small.engine", progress=lambda *step: steps.append(step))
    assert not steps
    assert (tmp_path / "file").read_bytes() == OLD


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs unshare")
def test_full_disk_is_one_clear_error(lynx: LynxOnnx, output: Path, script: Script) -> None:
    """On a real file system of 1 MiB; the engine with the plugin library in it takes more than 2."""
    code = f"""
output.write_bytes({OLD!r})
try:
    build(lynx, recipe.Engine(backend='tensorrt_rtx'), output)
except LynxError as error:
    print(error, [path.name for path in output.parent.iterdir()], output.read_bytes() == {OLD!r})
"""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" || exit 77; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, str(output.parent), *script(code, lynx, output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    said = done.stdout.strip()
    assert said.startswith(f"The disk is full: {output} could not be written (0.00 MB are free"), done.stderr
    assert said.endswith("['small.engine'] True"), said


def test_ctrl_c_stops_the_build(write_onnx: WriteOnnx, tmp_path: Path, output: Path, script: Script) -> None:
    lynx = write_onnx(tmp_path / "onnx", widths=(64,) * 401)  # 3258 steps
    code = """
import time
steps = []
def show(*step):
    if not steps:
        print('building', flush=True)
    steps.append(step)
    time.sleep(0.005)
try:
    build(lynx, recipe.Engine(backend='tensorrt_rtx'), output, progress=show)
except KeyboardInterrupt:
    print(*{phase for phase, _, _ in steps}, sep='\\n')
    sys.exit(130)
"""
    with subprocess.Popen(
        script(code, lynx, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "building\n"
        assert len(list(output.parent.iterdir())) == 2, "the build writes into a temporary file"
        child.send_signal(signal.SIGINT)
        phases, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "Cloning network graph" in phases and "Building engine from subgraph" not in phases
    assert_untouched(output)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_search_counts_across_pieces(size: int) -> None:
    text = b"..needle.needleneedle..need.leneed" + b"x" * 10 + b"needle"
    search = _Search(b"needle")
    for start in range(0, len(text), size):
        search.read(text[start : start + size])
    assert search.count == text.count(b"needle") == 4


def test_layers_of_all_plugins_are_counted(tmp_path: Path) -> None:
    records = [
        struct.pack("<Q", len(name)) + name
        for name in (b"LynxSparseLinear", b"LynxSparseWeightLinear", b"LynxSparseWeightLinear", b"LynxOther")
    ]
    with (tmp_path / "plan").open("wb") as file:
        plan = Plan(file)
        for piece in (b"vtrt", *records, b"LynxSparseWeightLinear"):
            plan.write(piece)
    assert (plan.records, plan.names) == (3, 4)


def edit(lynx: LynxOnnx, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(lynx.path, load_external_data=False)
    change(model.graph)
    onnx.save(model, lynx.path)


def remove_attribute(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend(kept)


def set_string(node: onnx.NodeProto, name: str, value: bytes) -> None:
    (attribute,) = (attribute for attribute in node.attribute if attribute.name == name)
    attribute.s = value


def copy_first_node(graph: onnx.GraphProto, *, used: bool) -> None:
    twin = onnx.NodeProto()
    twin.CopyFrom(graph.node[0])
    twin.name = "twin"
    twin.output[0] = "twin.y"
    graph.node.insert(1, twin)
    if used:
        graph.output.append(helper.make_tensor_value_info("twin.y", TensorProto.BFLOAT16, None))


def test_ctrl_c_while_the_thread_of_tensorrt_starts_waits_for_it() -> None:
    """Its parser holds the interpreter throughout, so that nothing else can come of a Ctrl-C meanwhile; what it reads
    must not be freed before it has ended."""
    ended, stop = threading.Event(), threading.Event()

    def work() -> bool:
        os.kill(os.getpid(), signal.SIGINT)  # before the thread that started this one goes on
        stop.wait(0.5)
        ended.set()
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.5)  # as long as a thread may hold the interpreter
    try:
        with pytest.raises(KeyboardInterrupt):
            build_module._in_thread(work, stop=stop)
    finally:
        sys.setswitchinterval(interval)
    assert ended.is_set() and stop.is_set()
