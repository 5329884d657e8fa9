# SPDX-License-Identifier: Apache-2.0
"""The flagship's command on models of one double and one single block, and what was foreseen of their memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lynx_compile.tools import flagship

COMMAND = [sys.executable, "-m", "lynx_compile.tools.flagship"]
RECIPE = {
    "budget": False,
    "calibration": {"tokens_per_call": 256},
    "sparsity": {"operand": "weight"},
    "compensation": {"tune": False},
    "engine": {"backend": "torch"},
}

ADDRESSES = 7 << 30  # of which torch's libraries and threads take 3


def _run(
    folder: Path,
    heads: int,
    *arguments: str,
    recipe: Mapping[str, Any] = RECIPE,
    addresses: int = resource.RLIM_INFINITY,
    ends: bool = True,
) -> list[list[str]]:
    """The rows of the table that it prints, in so many bytes of ``addresses`` (``ulimit -v``)."""
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": heads}
    given = ["--config", json.dumps(config), "--recipe", json.dumps(recipe)]
    done = subprocess.run(
        [*COMMAND, str(folder), *given, *arguments],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses)),
    )  # fmt: skip
    assert (done.returncode == 0) == ends, done.stdout + done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def _holds(rows: list[list[str]]) -> None:
    """Anonymous memory of every stage, of which something was said, within 30 % of that."""
    found = {row[0]: (float(row[3]), float(row[4])) for row in rows if row[4]}
    assert found.keys() >= {"calibrate", "compensate", "export"}
    for stage, (measured, expected) in found.items():
        assert measured == pytest.approx(expected, rel=0.3), (stage, found)


def test_a_small_model(tmp_path: Path) -> None:
    calls = ("--calls", "8")  # fewer are calibrated on in less time than the table shows
    _run(tmp_path, 2, "--limit", "1.5", *calls, ends=False)
    stopped = json.loads((tmp_path / "stages.json").read_text())
    assert stopped[0]["name"] == "open" and stopped[0]["seconds"] >= 1
    _holds(_run(tmp_path, 2, *calls, "--summary", str(tmp_path / "summary.json")))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["compile.flux1_dev.cpu.minutes"] > stopped[0]["seconds"] / 60
    assert not (tmp_path / "stages.json").exists()
    assert {"compile.flux1_dev.cpu.peak_anon_gib", "compile.flux1_dev.cpu.minutes"} <= summary.keys()


@pytest.mark.parametrize(
    ("name", "capability", "kind"),
    [
        ("NVIDIA H200", (9, 0), "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "nvidia_a100_sxm4_80gb"),
        (None, None, "cpu"),
    ],
)
def test_keys_name_the_machine(
    monkeypatch: pytest.MonkeyPatch, name: str | None, capability: tuple[int, int] | None, kind: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: name is not None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert flagship._kind() == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nope"], "error: There is no model 'nope'"),
        (["--config", "[]"], "argument --config: it should be a JSON object"),
        (["--config", '{"num_layers": "x"}'], "error: FluxTransformer2DModel cannot be made"),
        (["--recipe", '{"budget": 5}'], "'budget' is wrong"),
        (["--calls", "0"], "--calls is 0"),
        (["--config", '{"num_layers": 1, "num_single_layers": 1}'], "holds the weights of another model"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_written(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    if "another" in message:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    done = subprocess.run([*COMMAND, str(tmp_path), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_width_of_flux_in_little_memory(tmp_path: Path) -> None:
    """A double and a single block, 0.5 billion parameters: pruned, exported and rewritten within twice their bytes."""
    recipe = {**RECIPE, "sparsity": {"operand": "weight", "method": "magnitude"}}
    rows = _run(tmp_path, 24, recipe=recipe, addresses=ADDRESSES)
    stages = [row[0] for row in rows]
    assert {"compensate", "export", "rewrite"} <= set(stages)
    weights = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert max(float(row[3]) for row in rows) * 2**30 < 2 * weights, rows


@pytest.mark.slow
@pytest.mark.nightly
def test_at_the_width_of_flux(tmp_path: Path) -> None:
    """Hours: a solve of 12288 channels took twenty minutes of two busy cores, one of 15360 was not seen to its end."""
    _holds(_run(tmp_path, 24))
