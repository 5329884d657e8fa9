# SPDX-License-Identifier: Apache-2.0
"""The files of one compilation: all named after the engine, beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

from lynx_compile.errors import InputError

SUFFIX = ".engine"
OTHER_SUFFIXES = (
    ".yaml", ".yml", ".json", ".onnx", ".safetensors", ".log", ".html", ".png", ".cache", ".so",
)  # fmt: skip
NAME_BYTES = 255  # most that Linux's file systems take
TEMPORARY_BYTES = len("..12345678.tmp")  # what a file's temporary name adds (files/atomic.py)
_GIVE_NAME = "Give a file name, such as -o flux.engine."


@dataclass(frozen=True)
class Outputs:
    """Where the files of one engine are.

    They have the engine's whole name, of which ``.engine`` alone is taken off: flux.engine has flux.json,
    FLUX.1-dev has FLUX.1-dev.json, and flux.plan has flux.plan.json. ``cache``: a folder; the others are files in the
    engine's folder.
    """

    engine: Path
    manifest: Path
    onnx: Path
    weights: Path
    plugin: Path
    log: Path
    report: Path
    comparison: Path
    sheet: Path
    cache: Path

    @classmethod
    def of(cls, engine: Path, cache: Path | None = None) -> Outputs:
        """The names alone; nothing is looked up."""
        base = engine.name.removesuffix(SUFFIX) or engine.name

        def beside(suffix: str) -> Path:
            return engine.parent / f"{base}{suffix}"

        return cls(
            engine=engine,
            manifest=beside(".json"),
            onnx=beside(".onnx"),
            weights=beside(".safetensors"),
            plugin=beside(".liblynx_plugin.so"),
            log=beside(".log"),
            report=beside(".html"),
            comparison=beside(".compare.json"),
            sheet=beside(".compare.png"),
            cache=cache or beside(".cache"),
        )

    @classmethod
    def find(cls, engine: Path, cache: Path | None = None) -> Outputs:
        """Those of an engine that is there. Of a linked one they lie beside the link, else beside what it names.

        Raises:
            InputError: it is a folder, or its name is too long for a file.
        """
        engine = engine.absolute()
        _check_length(cls.of(engine))
        if engine.is_dir():
            raise InputError(f"{engine} is a folder.", "Give the engine's file, such as flux.engine.")
        cache = cache.absolute() if cache else None
        found, target = cls.of(engine, cache), cls.of(engine.resolve(), cache)
        return target if target.manifest.exists() and not found.manifest.exists() else found

    @classmethod
    def chosen(cls, engine: Path, cache: Path | None = None) -> Outputs:
        """Those that a compilation is to write: absolute, links followed.

        Raises:
            InputError: a name cannot be used, or a folder stands where a file is to be, or a file where the cache.
        """
        _check_length(cls.of(engine))
        if engine.is_dir() or engine.name in ("", ".", ".."):
            raise InputError(f"The output {engine} is a folder.", _GIVE_NAME)
        if engine.name.endswith("."):
            raise InputError(f"The output's name {engine.name} ends in a dot.", _GIVE_NAME)
        real = _resolved(engine)
        found = cls.of(real, _resolved(cache) if cache else _resolved(cls.of(real).cache))
        _check_length(found)
        if real.suffix in OTHER_SUFFIXES:
            raise InputError(
                f"The output {real} would take the place of another file.",
                "Give a name that ends in .engine.",
            )
        for path in found.files:
            if path.is_dir():
                raise InputError(
                    f"{path} is a folder, and a file of that name is to be written.",
                    "Give another output, or move the folder away.",
                )
        if found.cache.exists() and not found.cache.is_dir():
            raise InputError(
                f"{found.cache} is a file, and the cache is to be a folder of that name.",
                "Move the file away, or give another folder with --cache.",
            )
        return found

    def part(self, name: str) -> Outputs:
        """Those of one of several engines: of transformer_2 in wan.engine, wan.transformer_2.engine and so on."""
        base = self.engine.name.removesuffix(SUFFIX)
        return Outputs.chosen(self.engine.with_name(f"{base}.{name}{SUFFIX}"), self.cache / name)

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them, without the cache."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "cache")

    @property
    def dense(self) -> Path:
        """The dense ONNX, in the cache."""
        return self.cache / "dense" / "dense.onnx"

    @property
    def folder(self) -> Path:
        return self.engine.parent


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be followed ({reason}).", "Give another output.") from None


def _check_length(outputs: Outputs) -> None:
    name = outputs.engine.name
    longest = max(len(os.fsencode(path.name)) for path in outputs.files)
    excess = longest + TEMPORARY_BYTES - NAME_BYTES
    if excess > 0:
        room = len(os.fsencode(name)) - excess
        raise InputError(
            f"The engine's name has {len(os.fsencode(name))} bytes, and with what is added to it at most {room} fit.",
            "Give a shorter name.",
        )
