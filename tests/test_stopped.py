# SPDX-License-Identifier: Apache-2.0
"""A compilation that runs out of disk, and then is killed, in every stage: nothing is lost, and nothing half done."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lynx_compile.errors import DiskFullError
from lynx_compile.files import atomic
from lynx_compile.passes import build, sensitivity
from tests.test_outputs import compile_tiny, ran

FOLDERS = {  # in which a stage writes; what a stage does not keep in a file is in its stamp
    "capture": "recording/samples",
    "calibrate": "statistics",
    "compensate": "weights",
    "sensitivity": "sensitivity/calls",
    "tune": "tuned/blocks",
    "select": "select.stamp.json",
    "verify": "verify.stamp.json",
    "export": "dense",
    "rewrite": "lynx",
    "build": "engine",
}
MANY = ("capture", "calibrate", "compensate", "sensitivity")  # that write several files
Broken = Callable[[], None]


@pytest.fixture
def project(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny recipe with all stages that need no images."""
    monkeypatch.setattr(sensitivity, "ROWS", 8)
    folder = Path(shutil.copytree(tiny, tmp_path / "project"))
    text = (folder / "tiny.yaml").read_text().replace("budget: false", "budget: {min_speed: 1.1}")
    text = text.replace("tune: false", "tune: blockwise\n  steps: 2") + "engine:\n  backend: torch\n"
    (folder / "tiny.yaml").write_text(text)
    return folder


def test_in_every_stage(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    compile_tiny(whole)
    stages = tuple(stage for stage in FOLDERS if stage != "select")  # which goes by images
    assert ran(whole / "out" / "tiny.engine") == stages
    out = project / "out"
    killed: tuple[str, ...] = ()
    for stage in stages:
        with monkeypatch.context() as patch:
            _break(patch, stage, out / "tiny.cache", _disk_is_full)
            with pytest.raises(DiskFullError, match=r"The disk is full: .*tiny.cache.* could not be written"):
                compile_tiny(project)
        assert ran(out / "tiny.engine") == (*killed, stage) and not list(out.rglob("*.tmp"))
        assert _in_child(lambda stage=stage: _kill_in(stage, project)) == -signal.SIGKILL
        assert ran(out / "tiny.engine") == (killed := (stage,))
        assert {path.name for path in out.iterdir()} == {"tiny.cache", "tiny.log"}
    assert _in_child(lambda: _kill_while_publishing(project, "tiny.onnx")) == -signal.SIGKILL
    assert len({path.name for path in out.iterdir()} - {"tiny.cache", "tiny.log"}) == 1
    compile_tiny(project)
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("unfinished"))
    for name in ("tiny.engine", "tiny.onnx", "tiny.safetensors"):
        assert (out / name).read_bytes() == (whole / "out" / name).read_bytes()
    compile_tiny(project)
    assert ran(out / "tiny.engine") == ()


@pytest.mark.parametrize("last", ["tiny.onnx", "tiny.engine", "tiny.json"])
def test_while_outputs_take_their_places(project: Path, last: str) -> None:
    """An engine bears no mark of ours, and no manifest names it yet."""
    out = project / "out"
    assert _in_child(lambda: _kill_while_publishing(project, last)) == -signal.SIGKILL
    assert not (out / "tiny.json").exists()
    assert (out / "tiny.engine").exists() == (last != "tiny.onnx")
    compile_tiny(project)
    assert (out / "tiny.json").exists() and not list(out.rglob("*.tmp"))


def test_while_a_plan_is_chosen_by_images(project: Path) -> None:
    recipe = project / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("{min_speed: 1.1}", "{min_psnr: 12}"))
    out = project / "out"
    assert _in_child(lambda: _kill_in("select", project)) == -signal.SIGKILL
    assert ran(out / "tiny.engine")[-1] == "select"
    assert {path.name for path in out.iterdir()} == {"tiny.cache", "tiny.log"}
    manifest = compile_tiny(project)
    assert ran(out / "tiny.engine")[0] == "select" and not list(out.rglob("*.tmp"))
    assert manifest.budget is not None and (manifest.budget.psnr or 0) >= 12


def test_while_tensorrt_builds(project: Path) -> None:
    recipe = project / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("backend: torch", "backend: tensorrt_rtx"))
    out = project / "out"
    assert _in_child(lambda: _kill_while_building(project)) == -signal.SIGKILL
    assert ran(out / "tiny.engine")[-1] == "build"
    assert {path.name for path in out.iterdir()} == {"tiny.cache", "tiny.log"}
    compile_tiny(project)
    assert ran(out / "tiny.engine") == ("build",) and not list(out.rglob("*.tmp"))
    compile_tiny(project)
    assert ran(out / "tiny.engine") == ()


def _break(monkeypatch: pytest.MonkeyPatch, stage: str, cache: Path, broken: Broken) -> None:
    """``broken`` is called when a stage has written its second file, or its only one, before that has its name."""
    flush, place, files = atomic._flush, cache / FOLDERS[stage], set[Path]()

    def flushed(path: Path) -> None:
        if path.parent == place or path.name.startswith(f".{place.name}."):
            files.add(path)
            if len(files) == (2 if stage in MANY else 1):
                broken()
        flush(path)

    monkeypatch.setattr(atomic, "_flush", flushed)


def _disk_is_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in(stage: str, project: Path) -> None:
    _break(pytest.MonkeyPatch(), stage, project / "out" / "tiny.cache", _kill)
    compile_tiny(project)


def _kill_while_publishing(project: Path, last: str) -> None:
    """When the output ``last`` is in its place; of the manifest, when it is about to be."""
    replace, out = os.replace, project / "out"

    def replaced(source: Path, target: Path) -> None:
        if Path(target) == out / "tiny.json":
            _kill()
        replace(source, target)
        if Path(target) == out / last:
            _kill()

    pytest.MonkeyPatch().setattr(os, "replace", replaced)
    compile_tiny(project)


def _kill_while_building(project: Path) -> None:
    in_thread = build._in_thread

    def killed(work: Any, *arguments: Any, **options: Any) -> Any:
        if work.__name__.startswith("build"):  # else it is the parser's
            threading.Timer(0.05, _kill).start()
        return in_thread(work, *arguments, **options)

    pytest.MonkeyPatch().setattr(build, "_in_thread", killed)
    compile_tiny(project)


def _in_child(work: Callable[[], None]) -> int:
    """The exit code of a copy of this process that does it, which takes no time to start."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
