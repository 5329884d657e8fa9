# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out, as each library says it, in each stage: never a bug, never a damaged checkpoint."""

from __future__ import annotations

import errno
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch

from lynx_compile import cli, pipeline
from lynx_compile.errors import InputError, LynxError, OutOfMemoryError, is_out_of_memory, out_of_memory
from lynx_compile.models.checkpoint import open_checkpoint
from lynx_compile.recipe import load_recipe

HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 75497472000 bytes. Error code 12"
ERRORS = {
    "python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 12.0 GiB for an array with shape (3072, 524288)"),
    "torch on the host": RuntimeError(
        f"[enforce fail at alloc_cpu.cpp:121] err == 0. {HOST} (Cannot allocate memory)"
    ),
    "torch on a GPU": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."
    ),
    "CUDA": RuntimeError("CUDA error: out of memory"),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "ONNX Runtime": RuntimeError(
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9437184"
    ),
    "TensorRT": RuntimeError("[globWriter.cpp::makeResizableGpuMemory::423] Error Code 2: OutOfMemory"),
    "safetensors": safetensors.SafetensorError("Error while reading: Cannot allocate memory (os error 12)"),
    "a killed worker": RuntimeError("DataLoader worker (pid 7) is killed by signal 9: Killed."),
}
STAGES = {
    "capture": (pipeline, "record", "calibration.batch"),
    "calibrate": (pipeline, "calibrate", "calibration.memory_gib"),
    "compensate": (pipeline, "compensate", "calibration.memory_gib"),
    "export": (torch.onnx, "export", "End other programs"),
    "rewrite": (pipeline, "rewrite", "'weights: external'"),
    "build": (pipeline, "build", "engine.workspace_gib"),
}


def _raises(error: BaseException) -> Callable[..., object]:
    def run(*arguments: object, **settings: object) -> object:
        raise error

    return run


@pytest.mark.parametrize("name", ERRORS)
def test_every_librarys_words_are_known(name: str) -> None:
    assert is_out_of_memory(ERRORS[name])
    shown = out_of_memory("calibrate", ERRORS[name])
    assert ("GPU memory ran out" in str(shown)) == (name in ("torch on a GPU", "CUDA", "TensorRT"))
    assert shown.exit_code == 3 and not is_out_of_memory(shown)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        InputError("/data/out of memory/model is missing.", "Correct it."),
    ],
)
def test_nothing_else_is_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_an_explanation_of_another_cause_does_not_hide_it() -> None:
    def load() -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise InputError("The weights cannot be loaded.", "Fetch the checkpoint again.") from None

    with pytest.raises(InputError) as caught:
        load()
    assert is_out_of_memory(caught.value)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output for all stages in order, so that each test runs only what the one before did not reach."""
    return tmp_path_factory.mktemp("oom") / "tiny.engine"


@pytest.mark.parametrize(("stage", "name"), list(zip(STAGES, itertools.cycle(ERRORS), strict=False)))
def test_in_each_stage(
    tiny: Path, output: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str
) -> None:
    place, function, change = STAGES[stage]
    monkeypatch.setattr(place, function, _raises(ERRORS[name]))
    with pytest.raises(OutOfMemoryError) as caught:
        pipeline.compile(load_recipe(tiny / "tiny.yaml"), output)
    text = str(caught.value)
    assert text.startswith(f"Stage '{stage}' failed: ") and change in text and "memory ran out" in text
    assert not any(words in text for words in ("bug", "Fetch", "encoders", "\n"))
    assert not output.exists()


@pytest.mark.parametrize("name", ["python", "the system"])
def test_while_weights_are_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    monkeypatch.setattr("numpy.memmap", _raises(ERRORS[name]))
    with pytest.raises(OutOfMemoryError, match="Stage 'capture' failed: memory ran out"):
        pipeline.compile(load_recipe(tiny / "tiny.yaml"), tmp_path / "tiny.engine")


def test_while_a_checkpoints_tensor_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny / "model", "transformer")
    monkeypatch.setattr("numpy.memmap", _raises(ERRORS["the system"]))
    with pytest.raises(LynxError) as caught:
        checkpoint.load()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("command", ["inspect", "compile"])
def test_outside_of_stages(
    tiny: Path,
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "inspect":
        monkeypatch.setattr("lynx_compile.tools.inspection.inspect", _raises(MemoryError()))
        arguments = ["inspect", str(tmp_path / "tiny.engine")]
    else:
        monkeypatch.setattr("lynx_compile.recipe.load_recipe", _raises(ERRORS["torch on the host"]))
        arguments = [str(tiny / "tiny.yaml"), "-o", str(tmp_path / "tiny.engine")]
    monkeypatch.setattr(sys, "argv", ["lynx-compile", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 3
    assert capsys.readouterr().err == (
        "error: Memory ran out. End other programs, or use a machine with more of it.\n"
    )
