# SPDX-License-Identifier: Apache-2.0
"""Whose file is it? A compilation writes over what an earlier one wrote, and over nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lynx_compile import parallel
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import remove_leftovers
from lynx_compile.files.lock import HEAD_BYTES, locked
from lynx_compile.files.outputs import Outputs

LOCK = "lynx-compile.lock"
PRODUCER = "lynx-compile"
SCRATCH = "compare-"  # folders of the cache in which a run works

# How a file of ours begins, by its suffix. Engines and libraries cannot be marked: records tell those.
BEGINNINGS = {
    ".json": re.compile(rb'\{\s*"format_version": \d+,\s*"(compiler|engine_sha256)"'),
    ".onnx": re.compile(PRODUCER.encode()),
    ".safetensors": re.compile(rb'.{8}\{"__metadata__":\{"producer":"lynx-compile"', re.DOTALL),
    ".log": re.compile(rb"^[^\n]*lynx-compile \d"),
    ".html": re.compile(rb'<meta name="generator" content="lynx-compile'),
    ".png": re.compile(rb"Software\x00lynx-compile"),
}


@contextmanager
def claimed(outputs: Outputs, inputs: Iterable[Path], checkpoint: Path | None) -> Iterator[None]:
    """The outputs and their cache are this run's alone, and cleared of what killed runs have left.

    Args:
        inputs: files that are read. checkpoint: the model's folder.

    Raises:
        InputError: an output would take the place of an input or of somebody's file, or another run holds them.
    """
    if not parallel.is_first():  # which holds them for all
        yield
        return
    _refuse_inputs(outputs, inputs, checkpoint)
    refuse_foreign(outputs)
    with locked(outputs.cache / LOCK):
        remove_leftovers(outputs.folder, [path.name for path in outputs.files])
        for folder in (outputs.cache, *(path for path in outputs.cache.rglob("*") if path.is_dir())):
            remove_leftovers(folder)
        for scratch in outputs.cache.glob(f"{SCRATCH}*"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield


def refuse_foreign(outputs: Outputs) -> None:
    """Every file that is there must be an earlier run's.

    Raises:
        InputError: one is not.
    """
    recorded = _recorded(outputs)
    for path in outputs.files:
        if not _ours(path, recorded):
            raise InputError(
                f"{path} is there, and no run of lynx-compile for this output has written it.",
                f"Give another output, such as -o {_other_name(outputs)}, or move that file away.",
            )
    if (owner := _owner(outputs.manifest)) not in (None, outputs.engine.name):
        raise InputError(
            f"{outputs.manifest} belongs to the engine {owner}.",
            f"Give another output, such as -o {_other_name(outputs)}.",
        )
    cache = outputs.cache
    if cache.is_dir() and any(cache.iterdir()) and not (cache / LOCK).is_file():
        raise InputError(
            f"{cache} is there, and is no cache of lynx-compile.", "Give another output, or another --cache."
        )


def _refuse_inputs(outputs: Outputs, inputs: Iterable[Path], checkpoint: Path | None) -> None:
    for path in inputs:
        if path.resolve() in outputs.files:
            raise InputError(
                f"{path} is read for this engine, and its compilation would write over it.",
                f"Give another output, such as -o {_other_name(outputs)}.",
            )
    if checkpoint is None:
        return
    checkpoint = checkpoint.resolve()
    inside = outputs.folder != checkpoint and outputs.folder.is_relative_to(checkpoint)
    if inside and any(outputs.folder.glob("*config.json")):
        raise InputError(
            f"{outputs.folder} is a part of the checkpoint, which every file in it would change.",
            "Give an output in another folder.",
        )


def _other_name(outputs: Outputs) -> str:
    return f"{outputs.engine.name.removesuffix('.engine')}-lynx.engine"


def _recorded(outputs: Outputs) -> set[str]:
    """Names of files here that the manifest, or a stamp in the cache, says that a run has written."""
    names = set()
    manifest = _json(outputs.manifest)
    with suppress(KeyError, TypeError):
        names |= {manifest["engine"]["file"], manifest["plugin"]["library"]}
    for stamp in outputs.cache.glob("*.stamp.json"):
        with suppress(KeyError, TypeError, ValueError):
            names |= {
                Path(place["name"]).name for place, _ in _json(stamp)["files"] if _published(outputs, place)
            }
    return names


def _published(outputs: Outputs, place: dict[str, str]) -> bool:
    """Whether a stamp's file is an output; a run that was killed may have moved it and not said so."""
    in_cache = place["kind"] == "cache" and (outputs.cache / place["name"]).exists()
    return place["kind"] != "path" and not in_cache


def _ours(path: Path, recorded: set[str]) -> bool:
    try:
        with path.open("rb") as file:
            beginning = file.read(HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Give another output.") from None
    if not beginning:
        return True
    marker = BEGINNINGS.get(path.suffix)
    return path.name in recorded if marker is None else marker.search(beginning) is not None


def _owner(manifest: Path) -> str | None:
    """The engine of a manifest; None where there is none that can be read."""
    with suppress(KeyError, TypeError):
        return str(_json(manifest)["engine"]["file"])
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
