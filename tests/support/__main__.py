# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.support``: every class in a process of its own, then docs/support.md and docs/support.json.

A class whose result is in the cache folder, from the same code and the same libraries, is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tests.support.table import write

ROOT = Path(__file__).parents[2]
STAGES = ("captured", "exported", "rewritten", "engine", "dropin")
LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tensorrt_rtx_cu13")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", help="all by default")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "support")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--minutes", type=float, default=20.0, help="for a class, at most")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.classes[0], options.child, set(options.stages))
    else:
        _all(options)


def _all(options: argparse.Namespace) -> None:
    from lynx_compile.tools.support.configurations import classes

    options.cache.mkdir(parents=True, exist_ok=True)
    rows, every, key = [], sorted(classes()), _key(options.stages)
    for number, name in enumerate(every):
        result = options.cache / f"{name}.json"
        wanted = not options.classes or name in options.classes
        if wanted and not _is_of(result, key):
            print(f"{number + 1:3} of {len(every)}  {name}", flush=True)
            _run(name, result, key, options.stages, options.minutes)
        if result.exists():
            rows.append(json.loads(result.read_text())["row"])
    write(rows, ROOT / "docs")


def _run(name: str, result: Path, key: str, stages: list[str], minutes: float) -> None:
    """A class in a process of its own, so that one that dies takes nothing with it."""
    row = result.with_suffix(".row")
    row.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.support", name, "--child", str(row), "--stages", *stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = result.with_suffix(".log")
    reason = None
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                timeout=60 * minutes,
                check=False,
            ).returncode
            reason = f"its process ended with {code}; see {log.name}" if code else None
        except subprocess.TimeoutExpired:
            reason = f"not done after {minutes:g} minutes"
    found = {"class_name": name, "reason": [reason]} if reason else json.loads(row.read_text())
    row.unlink(missing_ok=True)
    result.write_text(json.dumps({"key": key, "row": found}, indent=1) + "\n")


def _child(name: str, row: Path, stages: set[str]) -> None:
    import torch

    from tests.support.check import check

    os.nice(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        row.write_text(json.dumps(asdict(check(name, Path(folder), stages))))


def _is_of(result: Path, key: str) -> bool:
    try:
        return bool(json.loads(result.read_text())["key"] == key)
    except (OSError, ValueError, KeyError):
        return False


def _key(stages: list[str]) -> str:
    """Of the code that a result depends on."""
    digest = hashlib.sha256(" ".join([*stages, *(f"{name} {version(name)}" for name in LIBRARIES)]).encode())
    folders = ["lynx_compile", "tests/support", "tests/engine", "tests/passes"]
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
