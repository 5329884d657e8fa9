# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lynx_compile.errors import DiskFullError, LynxError
from lynx_compile.files import disk
from lynx_compile.files.atomic import atomic_path, save_text, uninterrupted
from lynx_compile.files.tensors import TensorSpec, save_tensors, write_tensors


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        _fail(temporary.write_text("half"))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def _fail(_: object) -> None:
    raise KeyboardInterrupt


def test_signals_do_nothing_where_files_take_their_places() -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EACCES, "could not be written .* permissions"),
        (errno.EFBIG, "could not be written .*ulimit -f"),
    ],
)
def test_system_errors_are_one_sentence(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(LynxError, match=message), atomic_path(tmp_path / "file"):
        raise OSError(code, "no")
    assert not [*tmp_path.iterdir()]


def test_files_written_tensor_by_tensor_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16(), "full": torch.randn(2, 2),
        "whole": torch.arange(3), "short": torch.arange(3, dtype=torch.int32), "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]), "scalar": torch.tensor(2.0),
    }  # fmt: skip
    specs = [TensorSpec(n, t.dtype, tuple(t.shape), t.clone) for n, t in tensors.items()]
    offsets = write_tensors(tmp_path / "w.safetensors", specs)
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    content = (tmp_path / "w.safetensors").read_bytes()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
        start, size = offsets[name]
        assert start % max(tensor.itemsize, 1) == 0
        assert (
            content[start : start + size] == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )


def test_a_full_disk_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(
        DiskFullError, match=r"takes 4\.00 MB, and 1\.00 MB are free in .*; 3\.00 MB are missing"
    ):
        save_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(10**6)})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_in_what_libraries_make_of_it(error: Exception) -> None:
    with pytest.raises(ValueError, match="cannot write") as caught:
        _wrap(error)
    assert disk.is_full(caught.value)
    assert not disk.is_full(OSError(errno.EACCES, "Permission denied"))


def test_what_a_runtime_needs_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, lynx_compile.engine.manifest, lynx_compile.engine.trt\n"
        "print({'torch', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _wrap(error: Exception) -> None:
    try:
        raise error
    except Exception:
        raise ValueError("cannot write") from None
