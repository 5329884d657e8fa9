# SPDX-License-Identifier: Apache-2.0
"""Whose file is it? What a compilation writes over, what it takes for its own, and what two of them do at once."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from lynx_compile import pipeline
from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import DiskFullError, InputError, StageError
from lynx_compile.files import atomic, digest
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.resume import StageVersion
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.compiled import Compiled
from lynx_compile.tools.inspection import inspect
from tests.conftest import TINY

STAGES = ("capture", "calibrate", "compensate", "export", "rewrite", "build")


@pytest.fixture
def project(tiny: Path, compiled_tiny: Path, tmp_path: Path) -> Path:
    """The tiny recipe with its engine in ``out/``, copied from where it was compiled."""
    folder = tmp_path / "project"
    shutil.copytree(tiny, folder)
    shutil.copytree(compiled_tiny.parent, folder / "out")
    return folder


def compile_tiny(project: Path, output: str | Path = "out/tiny.engine", **options: Any) -> Manifest:
    """Compile as from the project's folder."""
    (manifest,) = pipeline.compile(load_recipe(project / "tiny.yaml"), project / output, **options)
    return manifest


def ran(engine: Path) -> tuple[str, ...]:
    """Stages that the last run did not take from the cache, by its log."""
    lines = Outputs.of(engine).log.read_text().splitlines()
    return tuple(line.split()[-2].rstrip(":") for line in lines if line.endswith(": started"))


def flip(path: Path) -> None:
    """One bit of another byte; the size stays, and so does the time of the change."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_model(folder: Path) -> None:
    """Another model of the same shapes in the place of ``model``."""
    torch.manual_seed(7)
    FluxTransformer2DModel(**TINY).save_pretrained(folder / "model" / "transformer")


# names


@pytest.mark.parametrize(
    ("engine", "manifest"),
    [
        ("flux.engine", "flux.json"),
        ("FLUX.1-dev", "FLUX.1-dev.json"),
        ("FLUX.1-dev.engine", "FLUX.1-dev.json"),
        ("x.plan", "x.plan.json"),
        (".engine", ".engine.json"),
    ],
)
def test_files_have_the_whole_name(engine: str, manifest: str) -> None:
    assert Outputs.of(Path("out", engine)).manifest == Path("out", manifest)


def test_no_two_names_share_a_file() -> None:
    names = ("FLUX.1-dev", "FLUX.1-schnell", "x.engine", "x.plan", "x.trt")
    files = [path for name in names for path in (*Outputs.of(Path(name)).files, Outputs.of(Path(name)).cache)]
    assert len(files) == len(set(files))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x" * 250 + ".engine", None, "name has 257 bytes, and with what is added to it at most"),
        ("x.", None, "ends in a dot"),
        ("folder", "folder/", "is a folder"),
        ("x.engine", "x.cache", "x.cache is a file, and the cache is to be a folder"),
        ("x.engine", "x.json/", "x.json is a folder, and a file of that name is to be written"),
        ("x.engine", "x.cache/mine.txt", "x.cache is there, and is no cache of lynx-compile"),
        ("x.onnx", None, "would take the place of another file"),
        ("loop.engine", "loop.engine -> loop.engine", "loop.engine cannot be followed"),
        ("x.engine", "x.json", "x.json is there, and no run of lynx-compile for this output has written it"),
        ("x.engine", "x.log", "x.log is there, and no run"),
        ("x.engine", "x.safetensors", "x.safetensors is there, and no run"),
        ("x.engine", "x.engine", "x.engine is there, and no run"),
        ("x.engine", "x.compare.png", "x.compare.png is there, and no run"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, name: str, make: str | None, message: str
) -> None:
    if make and " -> " in make:
        (tmp_path / make.split(" -> ")[0]).symlink_to(make.split(" -> ")[1])
    elif make:
        path = tmp_path / make
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if make.endswith("/") else path.write_text("somebody's")
    before = content(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        pipeline.compile(load_recipe(tiny / "tiny.yaml"), tmp_path / name)
    assert caught.value.exit_code == 2 and content(tmp_path) == before


def content(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def test_users_weights_beside_the_engine_stay(project: Path) -> None:
    """As of the one who puts flux1-dev.safetensors beside -o flux1-dev.engine."""
    mine = project / "flux1-dev.safetensors"
    save_file({"a": torch.ones(3)}, mine)
    before = mine.read_bytes()
    with pytest.raises(
        InputError, match=r"flux1-dev.safetensors is there.* such as -o flux1-dev-lynx.engine"
    ):
        compile_tiny(project, "flux1-dev.engine")
    assert mine.read_bytes() == before and not (project / "flux1-dev.log").exists()
    save_file({"a": torch.ones(3)}, project / "out" / "tiny.safetensors")  # also where ours has been
    with pytest.raises(InputError, match="tiny.safetensors is there, and no run"):
        compile_tiny(project)


def test_an_output_is_no_input(project: Path) -> None:
    """Prompts that this package itself has written, and so would take for its own."""
    shutil.copy(project / "out" / "tiny.safetensors", project / "prompts.safetensors")
    with pytest.raises(InputError, match="prompts.safetensors is read for this engine"):
        compile_tiny(project, "prompts.engine")
    with pytest.raises(InputError, match="transformer is a part of the checkpoint"):
        compile_tiny(project, "model/transformer/x.engine")
    assert not list((project / "model").rglob("x.*"))


def test_x_and_x_engine_do_not_share(project: Path) -> None:
    with pytest.raises(InputError, match="tiny.json belongs to the engine tiny.engine"):
        compile_tiny(project, "out/tiny")


# resuming


def test_nothing_runs_again_wherever_the_folders_are(project: Path, tmp_path: Path) -> None:
    compile_tiny(project)
    assert ran(project / "out" / "tiny.engine") == ()
    moved = tmp_path / "elsewhere"
    project.rename(moved)
    compile_tiny(moved)
    assert ran(moved / "out" / "tiny.engine") == ()
    (moved / "out" / "tiny.cache").rename(tmp_path / "cache")
    compile_tiny(moved, cache=tmp_path / "cache")
    assert ran(moved / "out" / "tiny.engine") == ()
    (moved / "out" / "tiny.cache").symlink_to(tmp_path / "cache")
    compile_tiny(moved)
    assert ran(moved / "out" / "tiny.engine") == ()


def test_compare_finds_its_files_from_any_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    pipeline.compile(load_recipe(Path("tiny.yaml")), Path("out/tiny.engine"))
    for folder, engine in (("out", "tiny.engine"), ("model", "../out/tiny.engine")):
        monkeypatch.chdir(project / folder)
        outputs = Outputs.find(Path(engine))
        assert (
            Compiled.read(outputs, Manifest.read(outputs.manifest).engine.sha256).recipe.model.dtype == "fp16"
        )
        assert outputs.dense.is_file() and not inspect(Path(engine)).problems
        monkeypatch.chdir(project)


def test_inspect_of_a_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", str(tmp_path)):
        with pytest.raises(InputError, match="is a folder"):
            inspect(Path(name))


def test_a_linked_output_is_followed(project: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.engine"
    link.symlink_to(project / "out" / "tiny.engine")
    manifest = compile_tiny(project, link)
    assert link.is_symlink() and manifest.engine.file == "tiny.engine"
    assert {path.name for path in tmp_path.iterdir()} == {"link.engine", "project"}
    assert not inspect(link).problems


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("tiny.engine", ("build",)),
        ("tiny.liblynx_plugin.so", ("build",)),
        ("tiny.safetensors", ("rewrite", "build")),
        ("tiny.onnx", ("rewrite", "build")),
    ],
)
def test_a_flipped_byte_in_an_output_is_repaired(project: Path, name: str, again: tuple[str, ...]) -> None:
    """A run before it takes the copied files for its own, times and all; then only the bytes tell."""
    engine, path = project / "out" / "tiny.engine", project / "out" / name
    compile_tiny(project)
    before = path.read_bytes()
    flip(path)
    assert path.read_bytes() != before
    manifest = compile_tiny(project)
    assert path.read_bytes() == before and ran(engine)[0] == again[0]
    assert not inspect(engine).problems
    assert digest.file_digest(project / "out" / manifest.plugin.library) == manifest.plugin.sha256


def test_a_flipped_byte_in_the_cache_gets_into_no_engine(project: Path) -> None:
    """Where a stage that reads the file runs, though the file looks untouched."""
    engine = project / "out" / "tiny.engine"
    compile_tiny(project)
    before = engine.read_bytes()
    for path in (project / "out" / "tiny.cache" / "weights").iterdir():
        flip(path)
    flip(project / "out" / "tiny.cache" / "dense" / "dense.onnx.data")
    (project / "out" / "tiny.onnx").unlink()
    compile_tiny(project)
    assert set(ran(engine)) >= {"compensate", "export", "rewrite"} and "calibrate" not in ran(engine)
    assert engine.read_bytes() == before


def test_another_models_weights_of_the_same_shapes_are_never_built_in(project: Path) -> None:
    ours, theirs = project / "out" / "tiny.safetensors", project / "other" / "tiny.safetensors"
    before = ours.read_bytes()
    other = shutil.copytree(project, project.parent / "other", ignore=shutil.ignore_patterns("out"))
    other_model(other)
    compile_tiny(other)
    theirs = other / "out" / "tiny.safetensors"
    assert theirs.stat().st_size == len(before) and theirs.read_bytes() != before
    shutil.copy(theirs, ours)
    compile_tiny(project)
    assert ran(project / "out" / "tiny.engine")[0] == "rewrite"
    assert ours.read_bytes() == before


def test_other_weights_in_the_same_folder_are_recorded_anew(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that was stopped is gone on with; one of another model's calls is not."""
    monkeypatch.setattr(pipeline, "build", _refused)
    recording = project / "out" / "tiny.cache" / "recording"
    before = {path.name: digest.file_digest(path) for path in recording.rglob("*.safetensors")}
    other_model(project)
    assert _first_stage(project) == "capture"
    after = {path.name: digest.file_digest(path) for path in recording.rglob("*.safetensors")}
    assert before.keys() == after.keys() and all(before[name] != after[name] for name in before)


def test_the_manifest_tells_what_was_written_not_what_lies_there(project: Path) -> None:
    """Flipped between the stage and the manifest, as by a failing disk."""
    weights = project / "out" / "tiny.safetensors"
    compile_tiny(project)
    before = Manifest.read(project / "out" / "tiny.json")
    build = pipeline.describe

    def spoil(*arguments: Any) -> Manifest:
        flip(weights)
        return build(*arguments)

    pipeline.describe, kept = spoil, pipeline.describe
    try:
        after = compile_tiny(project)
    finally:
        pipeline.describe = kept
    assert after.files == before.files
    assert {file.file for file in after.files} == {"tiny.onnx", "tiny.safetensors"}
    assert any(
        "tiny.safetensors does not" in problem
        for problem in inspect(weights.with_name("tiny.engine")).problems
    )


def test_editing_any_source_file_runs_nothing_again(project: Path, tmp_path: Path) -> None:
    package = tmp_path / "lynx_compile"
    shutil.copytree(Path(pipeline.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "tools" / "bench.py").open("a") as file:
        file.write("\nEDITED = True\n")
    code = (
        "import sys; from pathlib import Path; "
        "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('_editable')]; "
        "from lynx_compile import pipeline; "
        "from lynx_compile.recipe import load_recipe; assert 'EDITED' in "
        "Path(pipeline.__file__).with_name('tools').joinpath('bench.py').read_text(); "
        "pipeline.compile(load_recipe(Path('tiny.yaml')), Path('out/tiny.engine'))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ran(project / "out" / "tiny.engine") == ()


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_declares_its_version_and_runs_again_with_another(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    declared = {value.name: key for key, value in vars(pipeline).items() if isinstance(value, StageVersion)}
    left_out = {"sensitivity", "select", "tune", "verify"}  # by this recipe
    assert set(declared) == {*STAGES, *left_out}
    old: StageVersion = getattr(pipeline, declared[name])
    assert old.packages or name == "build", "which packages make it"
    new = StageVersion(name, old.number + 1, old.packages)
    monkeypatch.setattr(pipeline, declared[name], new)
    if name == "capture":  # a recording is of the version that made it
        monkeypatch.setattr("lynx_compile.passes.record.CAPTURE", new)
    monkeypatch.setattr(pipeline, "build", _refused)
    assert _first_stage(project) == name
    if name == "capture":
        assert ran(project / "out" / "tiny.engine") == STAGES, (
            "what is recorded otherwise is another recording"
        )


def test_another_version_of_a_package_runs_its_stages_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = "importlib.metadata.version"
    installed = __import__("importlib.metadata").metadata.version
    monkeypatch.setattr(version, lambda name: "9" if name == "onnxscript" else installed(name))
    monkeypatch.setattr(pipeline, "build", _refused)
    assert _first_stage(project) == "export"


def test_another_gpu_builds_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TensorRT builds for the GPU that it finds."""
    monkeypatch.setattr(trt, "build_gpu", lambda backend: "sm90 NVIDIA H200")
    monkeypatch.setattr(pipeline, "build", _refused)
    assert _first_stage(project) == "build"


def _refused(*_: object, **__: object) -> None:
    raise StageError("build", "there is none here.", "Do without.")


def _first_stage(project: Path) -> str:
    with pytest.raises(StageError, match="there is none here"):
        compile_tiny(project)
    return ran(project / "out" / "tiny.engine")[0]


# several runs, and those that end badly


HOLDER = """
import sys, time
from pathlib import Path
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.ownership import claimed

with claimed(Outputs.chosen(Path(sys.argv[1])), (), None):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(project: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that compiles into ``out/tiny.engine``."""
    command = [sys.executable, "-c", HOLDER, str(project / "out" / "tiny.engine")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_runs_into_one_output_do_not_mix(project: Path, holder: subprocess.Popen[str]) -> None:
    before = content(project / "out")
    message = rf"tiny.cache is in use: lynx-compile runs as process {holder.pid} on \S+ since "
    with pytest.raises(InputError, match=message) as caught:
        compile_tiny(project)
    assert caught.value.exit_code == 2 and content(project / "out") == before
    holder.kill()  # its lock goes with it
    holder.wait()
    compile_tiny(project)
    assert ran(project / "out" / "tiny.engine") == ()


def test_two_caches_do_not_make_two_outputs(project: Path, tmp_path: Path) -> None:
    with (project / "out" / "tiny.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        before = content(project / "out")
        with pytest.raises(
            InputError, match=r"out is in use: lynx-compile runs as process \d+ on .* with tiny.log"
        ):
            compile_tiny(project, cache=tmp_path / "another")
        assert content(project / "out") == before


def test_what_killed_runs_left_is_removed_and_nothing_else(project: Path) -> None:
    out, cache = project / "out", project / "out" / "tiny.cache"
    left = [out / ".tiny.engine.abcd1234.tmp", cache / "weights" / ".x.safetensors.abcd1234.tmp"]
    scratch = cache / "compare-abcd"
    scratch.mkdir()
    kept = [out / ".other.engine.abcd1234.tmp", out / ".tiny.engine.mine", out / ".tiny.json.alive123.tmp"]
    for path in (*left, *kept, scratch / "dense.onnx"):
        path.write_bytes(b"0" * 100)
    with kept[-1].open("rb") as living:  # as atomic_path does while it writes
        fcntl.flock(living, fcntl.LOCK_EX)
        compile_tiny(project)
    assert not any(path.exists() for path in (*left, scratch))
    assert all(path.exists() for path in kept)


def test_a_temporary_file_is_locked_while_it_is_written(tmp_path: Path) -> None:
    with atomic.atomic_path(tmp_path / "x") as temporary:
        atomic.remove_leftovers(tmp_path)
        assert temporary.exists()
        temporary.write_text("whole")
    assert (tmp_path / "x").read_text() == "whole"


def test_a_cache_on_another_file_system(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file can be renamed from the one to the other."""
    cache, replace = project / "cache", os.replace

    def in_cache(path: Any) -> bool:
        return Path(path).is_relative_to(cache)

    def replace_within(source: Any, target: Any) -> None:
        if in_cache(source) != in_cache(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_within)
    monkeypatch.setattr(atomic, "_device", in_cache)
    before = {path.name: path.read_bytes() for path in (project / "out").glob("tiny.[eos]*")}
    compile_tiny(project, cache=cache)
    assert ran(project / "out" / "tiny.engine") == STAGES
    assert {path.name: path.read_bytes() for path in (project / "out").glob("tiny.[eos]*")} == before
    assert not list(cache.rglob("*.engine")) and not list(project.rglob("*.tmp"))
    compile_tiny(project, cache=cache)
    assert ran(project / "out" / "tiny.engine") == ()


def test_a_full_disk_under_the_engine_says_so_and_leaves_the_old_one(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``test_stopped`` has the other stages."""
    out = project / "out"
    before = {path.name: path.read_bytes() for path in out.glob("tiny.[ejos]*")}
    monkeypatch.setattr(trt, "build_gpu", lambda backend: "sm90 NVIDIA H200")  # build again
    flush, folder = atomic._flush, out / "tiny.cache" / "engine"
    monkeypatch.setattr(
        atomic, "_flush", lambda path: _no_room(path) if path.parent == folder else flush(path)
    )
    with pytest.raises(
        DiskFullError, match=r"The disk is full: .*tiny.cache.* could not be written \(.* are free"
    ):
        compile_tiny(project)
    assert ran(out / "tiny.engine") == ("build",)
    assert {path.name: path.read_bytes() for path in out.glob("tiny.[ejos]*")} == before
    assert not list(out.rglob("*.tmp"))


def test_a_full_disk_under_the_log_is_silent(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The run's own error says it; a traceback a line would bury it."""
    monkeypatch.setattr(pipeline._Handler, "flush", _no_room)
    compile_tiny(project)
    assert "Traceback" not in capfd.readouterr().err


def _no_room(_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
