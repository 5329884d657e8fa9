# SPDX-License-Identifier: Apache-2.0
"""Which GPUs an engine runs on: Python and C++ answer alike, by one table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lynx_compile.engine.manifest import runs_on
from tests.runtime_cpp.conftest import output

TABLE = json.loads((Path(__file__).parents[1] / "engine" / "gpus.json").read_text())
CASES = [
    (row["backend"], row["built for"], gpu, answer)
    for row in TABLE
    for answer, gpus in ((True, row["runs on"]), (False, row["not on"]))
    for gpu in gpus
]


@pytest.mark.parametrize(("backend", "built", "gpu", "answer"), CASES)
def test_python(backend: str, built: list[str], gpu: str, answer: bool) -> None:
    manifest: Any = SimpleNamespace(backend=SimpleNamespace(name=backend), gpus=tuple(built))
    assert runs_on(manifest, gpu) is answer


def test_cpp(programs: Path, tmp_path: Path, tiny_engine: Path) -> None:
    values = json.loads(tiny_engine.with_suffix(".json").read_text())
    path = tmp_path / "engine.json"
    for backend, built, gpu, answer in CASES:
        path.write_text(
            json.dumps(values | {"gpus": built, "backend": {"name": backend, "version": "1.7.1.116"}})
        )
        said = output(programs / "runtime_probe", "runs_on", path, gpu).strip()
        assert (said == "yes") is answer, (backend, built, gpu)
