# SPDX-License-Identifier: Apache-2.0
"""The C++ runtime reads what Python writes: digests, safetensors files, manifests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.engine.conftest import _write_onnx
from tests.engine.test_manifest import described
from tests.runtime_cpp.conftest import output, run

DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 1 << 20])
def test_sha256_is_pythons(programs: Path, tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "data").write_bytes(data)
    found = output(programs / "runtime_probe", "sha256", tmp_path / "data").split()
    assert set(found) == {
        hashlib.sha256(data).hexdigest()
    }  # by plain C++ and, where it has them, by the CPU's instructions


def test_safetensors_of_the_library_itself(programs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{name}.größe": (torch.randn(3, 5) * 9).to(dtype) for dtype, name in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 7)}
    save_file(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    lines = output(programs / "runtime_probe", "safetensors", tmp_path / "t.safetensors").splitlines()
    wanted = {
        f"{name} {DTYPES[tensor.dtype]} {list(tensor.shape)} "
        + hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
        if tensor.ndim
    }
    wanted.add(f"scalar fp32 [] {hashlib.sha256(np.float32(2.5).tobytes()).hexdigest()}")
    assert set(lines) == wanted


def test_real_weights(programs: Path) -> None:
    path = Path("calib/digits_flux/model/transformer/diffusion_pytorch_model.safetensors")
    lines = output(programs / "runtime_probe", "safetensors", path).splitlines()
    size = int.from_bytes(path.open("rb").read(8), "little")
    header = json.loads(path.open("rb").read(8 + size)[8:])
    assert {line.split(" ")[0] for line in lines} == set(header) - {"__metadata__"}


@pytest.mark.parametrize("kind", ["safetensors", "manifest"])
def test_an_error_is_one_line_with_a_remedy(programs: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x04pickle")
    done = run(programs / "runtime_probe", kind, path)
    assert done.returncode == 3
    assert done.stderr.startswith(str(path)) and done.stderr.count("\n") == 1
    assert "compile" in done.stderr.lower()


@pytest.mark.slow
@pytest.mark.parametrize("external", [False, True])
def test_manifest_of_the_compiler(programs: Path, tmp_path: Path, external: bool) -> None:
    """Of an engine with embedded weights and of one with external ones."""
    manifest = described(_write_onnx(tmp_path / "onnx", external=external), tmp_path / "small.engine")
    manifest.write(tmp_path / "small.json")
    lines = output(programs / "runtime_probe", "manifest", tmp_path / "small.json").splitlines()
    assert lines[0] == f"engine {hashlib.sha256((tmp_path / 'small.engine').read_bytes()).hexdigest()}"
    assert lines[1] == f"backend {manifest.backend.name} {manifest.backend.version}"
    assert lines[2] == f"plugin {manifest.plugin.sha256}"
    assert lines[3] == f"weights {manifest.weights.file or ''}"
    tensors = {"input": manifest.inputs, "output": manifest.outputs, "weight": manifest.weights.tensors}
    wanted = [f"{kind} {t.name} {t.dtype} {list(t.shape)}" for kind, all_ in tensors.items() for t in all_]
    assert lines[4:] == wanted and ("weight" in wanted[-1]) == external
