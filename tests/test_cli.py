# SPDX-License-Identifier: Apache-2.0
"""The command as a user runs it: what it writes, what it does again, and how it fails."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file

from lynx_compile import cli, pipeline
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError, StageError
from lynx_compile.ops.functions import DOMAIN, GELU_OP, NORM_OP, OP, WEIGHT_OP
from tests.models.test_lora import ADAPTED, write_lora

pytestmark = pytest.mark.slow
# With as many threads as the tests: LAPACK's last bits depend on their number.
COMMAND = [
    sys.executable, "-c", "import torch; torch.set_num_threads(1); from lynx_compile.cli import main; main()",
]  # fmt: skip
STAGES = ["capture", "calibrate", "compensate", "export", "rewrite", "build"]


@pytest.fixture(scope="module")
def project(tiny: Path, compiled_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny recipe with its engine in ``out``."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    shutil.copytree(compiled_tiny.parent, folder / "out")
    return folder


def _main(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """The command in this process, which has torch loaded already."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lynx-compile", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def _stages_run(folder: Path) -> list[str]:
    """Stages that the last run did not take from the run before, by its log."""
    lines = (folder / "out" / "tiny.log").read_text().splitlines()
    return [line.split()[-2].rstrip(":") for line in lines if line.endswith(": started")]


def test_everything_lies_beside_the_engine(project: Path) -> None:
    out = project / "out"
    assert {path.name for path in out.iterdir()} == {
        "tiny.engine", "tiny.json", "tiny.html", "tiny.onnx", "tiny.safetensors", "tiny.log", "tiny.cache",
        "tiny.liblynx_plugin.so",
    }  # fmt: skip
    manifest = Manifest.read(out / "tiny.json")
    model = onnx.load(out / "tiny.onnx", load_external_data=False)
    assert (
        manifest.plugin_layers
        == sum(node.domain == DOMAIN for node in model.graph.node)
        == len(manifest.sparse)
        == 10
    )
    assert (out / "tiny.engine").read_bytes()[:4] == b"vtrt"
    assert manifest.engine.bytes == (out / "tiny.engine").stat().st_size
    assert [tensor.name for tensor in manifest.inputs][:2] == ["hidden_states", "encoder_hidden_states"]
    onnx.checker.check_model(out / "tiny.onnx", full_check=True)
    assert load_file(out / "tiny.safetensors")


def test_nothing_is_done_twice_and_a_change_runs_what_depends_on_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    recipe = (tmp_path / "tiny.yaml").read_text()
    for text, expected in (
        (recipe, []),
        (recipe + "sparsity: {rank: 16}\n", ["calibrate", "compensate", "rewrite", "build"]),
        (recipe + "sparsity: {rank: 16}\nengine: {gpus: [sm80]}\n", ["build"]),
    ):
        (tmp_path / "tiny.yaml").write_text(text)
        assert _main(monkeypatch, tmp_path, "tiny.yaml", "-o", "out/tiny.engine") == 0
        assert _stages_run(tmp_path) == expected
    # A damaged file is made again; --fresh makes all of them again.
    (tmp_path / "out" / "tiny.engine").write_bytes(b"cut")
    assert _main(monkeypatch, tmp_path, "tiny.yaml", "-o", "out/tiny.engine") == 0
    assert _stages_run(tmp_path) == ["build"]
    assert _main(monkeypatch, tmp_path, "tiny.yaml", "-o", "out/tiny.engine", "--fresh") == 0
    assert _stages_run(tmp_path) == STAGES


def test_a_failed_build_leaves_the_old_engine_and_its_files(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("tiny.[ejos]*")}
    text = (tmp_path / "tiny.yaml").read_text() + "sparsity: {rank: 0}\nengine: {gpus: [sm80]}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    monkeypatch.setattr("lynx_compile.passes.build._serialize", _cannot_build)
    assert _main(monkeypatch, tmp_path, "tiny.yaml", "-o", "out/tiny.engine") == 3
    assert "Stage 'build' failed: TensorRT built no engine" in " ".join(capsys.readouterr().err.split())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("tiny.[ejos]*")} == before


def _cannot_build(*_: object) -> None:
    raise StageError("build", "TensorRT built no engine.", "See the log.")


@pytest.mark.parametrize(
    ("moment", "number", "code"), [("calibrate", signal.SIGTERM, 143), ("build", signal.SIGINT, 130)]
)
def test_ctrl_c_and_sigterm_leave_nothing_half_done(
    project: Path, tmp_path: Path, moment: str, number: signal.Signals, code: int
) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("tiny.[ejos]*")}
    recipe = tmp_path / "tiny.yaml"
    if moment == "calibrate":  # so that it takes a while
        recipe.write_text(recipe.read_text().replace("samples: 6", "samples: 60"))
    else:
        recipe.write_text(recipe.read_text() + "engine: {workspace_gib: 2}\n")
    log, marker = tmp_path / "out" / "tiny.log", f"{moment}: started"
    log.unlink()
    process = subprocess.Popen(
        [*COMMAND, "tiny.yaml", "-o", "out/tiny.engine"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600  # of a busy machine
    while marker not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("tiny.[ejos]*")} == before
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "error", [ValueError("could not determine the shape"), InputError("Damaged.", "Fetch.")]
)
def test_ctrl_c_that_a_library_takes_for_a_failure_is_still_ctrl_c(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    number: signal.Signals,
    code: int,
) -> None:
    """As torch does with one that strikes its C++, and diffusers with what torch makes of it."""

    def interrupted(*_: object, **__: object) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        try:
            raise error
        except Exception:
            logging.getLogger("lynx_compile.files.resume").exception("calibrate failed")
            raise

    monkeypatch.setattr(pipeline, "compile", interrupted)
    assert _main(monkeypatch, project, "tiny.yaml", "-o", "out/tiny.engine") == code
    shown = capsys.readouterr().err
    assert "interrupted: no output was changed" in shown
    assert str(error) not in shown and "Traceback" not in shown
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.yaml", "-o", "x.engine"], 2, "The recipe none.yaml does not exist"),
        (["tiny.yaml"], 2, "Missing option"),
        (["tiny.yaml", "-o", "model"], 2, "is a folder"),
        (["tiny.yaml", "-o", "tiny.yaml"], 2, "would take the place of the recipe"),
        (["tiny.yaml", "-o", "out/tiny.onnx"], 2, "would take the place of another file"),
        (["tiny.yaml", "-o", "prompts.safetensors/x.engine"], 2, "cannot be written"),
        (["--version"], 0, ""),
    ],
)
def test_wrong_use(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert _main(monkeypatch, project, *arguments) == code
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("engine: {backend: tensorrt}", 2, "tensorrt is not installed|there is none"),
        ("engine: {plugin: none.so}", 2, "none.so does not exist"),
        ("engine: {plugin: prompts.safetensors}", 2, "prompts.safetensors is no plugin library"),
        ("engine: {plugin: elf.so}", 2, "elf.so cannot be loaded"),
        ("engine: {plugin: /lib/x86_64-linux-gnu/libm.so.6}", 2, "libm.so.6 is no plugin library"),
        ("sparsity: {exclude: ['*']}", 2, "No linear would become sparse"),
        ("sparsity: {include: ['blocks.*']}", 2, "'blocks.*' matches no linear"),
    ],
)
def test_wrong_recipe_values(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    code: int,
    message: str,
) -> None:
    (project / "wrong.yaml").write_text((project / "tiny.yaml").read_text() + change + "\n")
    (project / "elf.so").write_bytes(b"\x7fELF, but no library")
    assert _main(monkeypatch, project, "wrong.yaml", "-o", "elsewhere/x.engine") == code
    shown = " ".join(capsys.readouterr().err.split())
    assert any(part in shown for part in message.split("|"))


def test_external_weights(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small engine; the weights are inputs that the manifest names and the safetensors file holds."""
    (project / "external.yaml").write_text(
        (project / "tiny.yaml").read_text() + "engine: {weights: external}\n"
    )
    assert _main(monkeypatch, project, "external.yaml", "-o", "external/tiny.engine") == 0
    manifest = Manifest.read(project / "external" / "tiny.json")
    tensors = load_file(project / "external" / "tiny.safetensors")
    assert manifest.weights.mode == "external" and manifest.weights.file == "tiny.safetensors"
    assert len(manifest.weights.tensors) == 3 * manifest.plugin_layers
    assert all(tuple(tensors[t.name].shape) == t.shape for t in manifest.weights.tensors)
    embedded = json.loads((project / "out" / "tiny.json").read_text())["engine"]["bytes"]
    assert manifest.engine.bytes < embedded
    assert manifest.plugin_layers == 10


def test_another_lora_takes_another_weights_file_and_the_same_engine(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A, B, A on external weights: what is built is built once, and A's weights are the same to the bit.

    As long as they change weights that are inputs: a small dense linear (x_embedder) is a constant of the engine.
    """
    recipe = (project / "tiny.yaml").read_text() + "engine: {weights: external}\n"
    found: dict[str, list[bytes]] = {"a": [], "b": []}
    engines, builds = set(), []
    for number, name in enumerate("aba"):
        write_lora(
            project / f"{name}.safetensors", project / "model" / "transformer", ord(name), adapted=ADAPTED[:2]
        )
        loras = f"model:\n  loras: [{{source: {name}.safetensors, scale: 0.5}}]"
        (project / "lora.yaml").write_text(recipe.replace("model:", loras, 1))
        assert _main(monkeypatch, project, "lora.yaml", "-o", "lora/tiny.engine") == 0
        engine = project / "lora" / "tiny.engine"
        engines.add(engine.read_bytes())
        manifest = Manifest.read(project / "lora" / "tiny.json")
        builds += [stage.reused for stage in manifest.stages if stage.name == "build"]
        assert manifest.source.loras[0].endswith(f"{name}.safetensors x 0.5")
        found[name].append((project / "lora" / "tiny.safetensors").read_bytes())
        assert len(found[name]) == (2 if number == 2 else 1)
    assert builds == [False, True, True] and len(engines) == 1
    assert found["a"][0] == found["a"][1] != found["b"][0]


def test_the_manifest_tells_what_each_layer_makes_of_its_input(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = (project / "tiny.yaml").read_text(), project / "activations"
    (project / "activations.yaml").write_text(f"{recipe}sparsity: {{operand: activation}}\n")
    assert _main(monkeypatch, project, "activations.yaml", "-o", "activations/tiny.engine") == 0
    manifest = Manifest.read(folder / "tiny.json")
    assert manifest.plugin.names == (OP, NORM_OP)
    normed = [layer for layer in manifest.sparse if layer.producer]
    assert {layer.producer for layer in normed} == {"layer norm"} and len(normed) == 5
    model = onnx.load(folder / "tiny.onnx", load_external_data=False)
    ops = {node.name: node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert {name for name, op in ops.items() if op == NORM_OP} == {layer.layer for layer in normed}
    plan = (folder / "tiny.engine").read_bytes()
    records = {name: plan.count(struct.pack("<Q", len(name)) + name.encode()) for name in (OP, NORM_OP)}
    assert records == {OP: 5, NORM_OP: 5}
    # TensorRT says so of each attribute that a node leaves to the plugin's default.
    assert "not found in plugin node" not in (folder / "tiny.log").read_text()


def test_weights_as_the_sparse_operand(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them; and some, with a GELU taken in by the one linear that reads it."""
    recipe, folder = (project / "tiny.yaml").read_text(), project / "weights"
    for name, operand in (
        ("all", "weight"),
        ("some", "{'single_*': weight, 'transformer_*.proj': none, '*': activation}"),
    ):
        (project / f"{name}.yaml").write_text(f"{recipe}sparsity: {{operand: {operand}}}\n")
        assert _main(monkeypatch, project, f"{name}.yaml", "-o", f"weights/{name}.engine") == 0
    every, some = (Manifest.read(folder / f"{name}.json") for name in ("all", "some"))
    assert every.plugin.names == (WEIGHT_OP,) and every.plugin_layers == 10
    assert {(layer.operand, layer.producer) for layer in every.sparse} == {("weight", None)}
    assert some.plugin.names == (OP, NORM_OP, GELU_OP, WEIGHT_OP) and some.plugin_layers == 8
    assert sorted((layer.operand, layer.producer or "") for layer in some.sparse) == [
        *[("activation", "")] * 2,
        *[("activation", "gelu")] * 2,
        *[("activation", "layer norm")] * 2,
        *[("weight", "")] * 2,
    ]


def test_two_runs_give_the_same_engine(project: Path) -> None:
    """One by the command in a process of its own."""
    command = [*COMMAND, "tiny.yaml", "-o", "again/tiny.engine"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("tiny.engine", "tiny.onnx", "tiny.safetensors"):
        assert (project / "again" / name).read_bytes() == (project / "out" / name).read_bytes(), name
