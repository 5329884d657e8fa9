# SPDX-License-Identifier: Apache-2.0
"""Two GPUs: calibration shared out by torchrun adds its moments up through NCCL, equal to one process's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lynx_compile.passes.compensate import load_weights
from tests.processes import free_port

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SAME = 1e-3  # of moments: a model in fp16, whose last bits a GPU may sum otherwise


def test_two_gpus_measure_what_one_does(tiny: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(tiny, tmp_path / "project"))
    with (project / "tiny.yaml").open("a") as recipe:
        recipe.write("engine: {backend: torch, gpus: [sm90], weights: external}\n")
        recipe.write("sparsity: {operand: {'*.ff.*': activation, '*': weight}}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        done = subprocess.run(
            [*command, "-m", "lynx_compile", "tiny.yaml", "-o", f"{name}/tiny.engine"],
            cwd=project, capture_output=True, text=True, timeout=300, env={**os.environ, "NCCL_DEBUG": "VERSION"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert "NCCL version" in done.stdout + done.stderr  # of the run by two: it went through NCCL
    one, two = (project / name / "tiny.cache" for name in ("one", "two"))
    files = sorted(path.name for path in (one / "statistics").iterdir())
    assert files == sorted(path.name for path in (two / "statistics").iterdir())
    worst = 0.0
    for name in files:
        was, found = (load_file(cache / "statistics" / name) for cache in (one, two))
        assert found.keys() == was.keys() and found["tokens"] == was["tokens"]
        for part in was.keys() - {"tokens"}:
            worst = max(worst, float((found[part] - was[part]).norm() / was[part].norm()))
    print(f"largest difference of moments: {worst:.1e} of their norm, in {len(files)} tensors")
    assert worst < SAME
    for path in (one / "weights").iterdir():
        errors = load_weights(two / "weights" / path.name).errors
        assert errors == pytest.approx(load_weights(path).errors, rel=0.02)
