# SPDX-License-Identifier: Apache-2.0
"""Run a stage, or take its result from the last run if nothing that it depends on has changed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from lynx_compile import parallel
from lynx_compile.errors import (
    DiskFullError,
    EngineError,
    LynxError,
    StageError,
    first_line,
    is_out_of_memory,
    out_of_memory,
)
from lynx_compile.files import disk
from lynx_compile.files.atomic import moved, save_text
from lynx_compile.files.digest import Written, changed, written
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.progress import Progress, no_progress

Display = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def silent(name: str) -> Iterator[Progress]:
    """The ``Display`` that shows nothing."""
    yield no_progress


T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageVersion:
    """What of the compiler itself decides a stage's result; declared beside the stage.

    ``number``: raised by hand with every change after which the same inputs give another result.
    ``packages``: Python packages whose versions count as well.
    """

    name: str
    number: int
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a stage took when it ran: wall time, and the most memory this process held meanwhile (None: unknown).

    ``reused``: that was in an earlier run, from which its result was taken.
    """

    seconds: float
    peak_bytes: int | None
    reused: bool


@dataclass(frozen=True)
class Place:
    """Where a file is, wherever its folder is moved: in the ``cache``, among the ``output`` files, or by its path."""

    kind: Literal["cache", "output", "path"]
    name: str


@dataclass(frozen=True)
class Stamp:
    """What is kept of a stage that has run. ``value``: with every path in it as {PLACE: place}."""

    key: str
    files: tuple[tuple[Place, Written], ...]
    value: Any
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class _Run:
    """A stage of this compilation: how it is run again, and the stages whose files it reads."""

    version: StageVersion
    adapter: TypeAdapter[Any]
    produce: Callable[[Progress], Any]
    reads: tuple[StageVersion, ...]


class Stages:
    """The stages of one compilation, with a stamp for each in the cache.

    A stage is taken from its stamp if its key (a SHA-256 over its inputs and its version) is the same and its files
    hold what was written. Those are digested again only where size, time or inode is another, since a model's take
    long; but always where they go into the engine: what a running stage reads, and what is published.

    Of several processes the first one decides that, writes the stamps, and tells the others every stage's value.
    """

    def __init__(self, outputs: Outputs, fresh: bool, display: Display) -> None:
        self._outputs = outputs
        self._fresh = fresh
        self._display = display
        self._keys: dict[str, str] = {}
        self._runs: dict[str, _Run] = {}
        self._stamps: dict[str, Stamp] = {}
        self._digested: set[str] = set()
        self._topic = ""
        self.costs: dict[str, Cost] = {}

    def key(self, stage: StageVersion) -> str:
        """The key of a stage that has run."""
        return self._keys[stage.name]

    def run(
        self,
        stage: StageVersion,
        kind: Any,
        produce: Callable[[Progress], T],
        *inputs: Any,
        reads: tuple[StageVersion, ...] = (),
        published: bool = False,
        shared: bool = False,
    ) -> T:
        """The stage's value: ``produce``'s, or the stamped one when ``inputs`` are the same.

        Args:
            kind: type of the value (dataclasses, tuples, paths), for reading a stamp.
            reads: stages whose files ``produce`` reads. One whose files are damaged is run again before it.
            published: its files are outputs.
            shared: ``produce`` runs in all processes, and shares its work out; else in the first one alone.
        """
        name, adapter = stage.name, TypeAdapter(kind)
        self._keys[name] = key_of(stage, *inputs)
        self._runs[name] = _Run(stage, adapter, produce, reads)
        self._topic = f"{self._outputs.engine}: {name}"
        if not parallel.is_first():
            return cast(T, self._followed(adapter))
        with nullcontext() if shared else parallel.alone():
            value = self._value(name, adapter, published)
        parallel.tell(self._topic, json.dumps({"value": adapter.dump_python(value, mode="json")}))
        return cast(T, value)

    def _value(self, name: str, adapter: TypeAdapter[T], published: bool) -> T:
        """Of the stage: the stamped one, or what it produces."""
        key = self._keys[name]
        if not self._fresh and (stamp := self._read(name, key)) is not None:
            with self._display(name) as progress:
                progress("unchanged", 0, 1)
                value = self._taken(name, stamp, adapter, thorough=published)
                if value is not None:
                    progress("unchanged", 1, 1)
                    return value[0]
        return cast(T, self._produced(name))

    def _followed(self, adapter: TypeAdapter[T]) -> T:
        """What the first process says of a stage, which may have this process do its share of a stage first."""
        while "run" in (said := json.loads(parallel.hear(self._topic))):
            _produced(said["run"], self._runs[said["run"]].produce, no_progress, self._outputs.cache)
        return adapter.validate_json(json.dumps(said["value"]))

    def written(self, *stages: StageVersion) -> dict[str, Written]:
        """The files of these stages, {file name: as it was written}."""
        return {
            Path(place.name).name: was for stage in stages for place, was in self._stamps[stage.name].files
        }

    @contextmanager
    def publish(self, *stages: StageVersion) -> Iterator[None]:
        """Move the files of these stages' values to the outputs; what the block writes there belongs to them.

        Moved and not linked or copied: ONNX refuses weights that have hard links, and a copy of a large model
        takes its size again. Not interrupted.
        """
        places = {
            place: Place("output", Path(place.name).name)
            for stage in stages
            for place, _ in self._stamps[stage.name].files
            if place.kind == "cache"
        }
        with moved({self._path(old): self._path(new) for old, new in places.items()}):
            for stage in stages:
                stamp = self._stamps[stage.name]
                files = tuple((places.get(place, place), was) for place, was in stamp.files)
                self._keep(stage.name, replace(stamp, files=files, value=_replaced(stamp.value, places)))
            yield

    def _read(self, name: str, key: str) -> Stamp | None:
        """The stage's stamp if there is a whole one of this key."""
        try:
            stamp = _STAMP.validate_json(self._stamp_path(name).read_bytes())
        except (OSError, ValidationError):
            return None
        return stamp if stamp.key == key else None

    def _taken(self, name: str, stamp: Stamp, adapter: TypeAdapter[T], *, thorough: bool) -> tuple[T] | None:
        """The stamped value, if its files are as they were written."""
        files = {self._path(place): was for place, was in stamp.files}
        if (damaged := changed(files, thorough=thorough)) is not None:
            log.warning("%s: %s is not what was written, or is gone; the stage runs again", name, damaged)
            return None
        try:
            value = adapter.validate_json(json.dumps(self._unplaced(stamp.value)))
        except (ValueError, KeyError, TypeError):
            return None
        log.info("%s: unchanged, taken from the last run", name)
        self._stamps[name] = stamp
        self._digested |= {name} if thorough else set()
        if not all(was.untouched(path) for path, was in files.items()):  # copied or restored: the same bytes
            self._keep(name, stamp)
        self.costs[name] = Cost(stamp.seconds, stamp.peak_bytes, reused=True)
        return (value,)

    def _produced(self, name: str) -> Any:
        """Run a stage, once what it reads is whole."""
        run = self._runs[name]
        for stage in run.reads:
            self._restored(stage.name)
        self._stamp_path(name).unlink(missing_ok=True)
        log.info("%s: started", name)
        parallel.tell(self._topic, json.dumps({"run": name}))
        _forget_peak()
        start = time.monotonic()
        with self._display(name) as progress:
            value = _produced(name, run.produce, progress, self._outputs.cache)
        cost = self.costs[name] = Cost(time.monotonic() - start, _peak_bytes(), reused=False)
        log.info("%s: %.1f s", name, cost.seconds)
        self._digested.add(name)
        content = self._placed(run.adapter.dump_python(value))
        files = tuple((self._place(path), written(path)) for path in _paths(value))
        self._keep(name, Stamp(self._keys[name], files, content, cost.seconds, cost.peak_bytes))
        return value

    def _restored(self, name: str) -> None:
        """Run a stage again that was taken from its stamp, if its files turn out to be damaged."""
        if name in self._digested:
            return
        self._digested.add(name)
        files = {self._path(place): was for place, was in self._stamps[name].files}
        if (damaged := changed(files, thorough=True)) is not None:
            log.warning("%s: %s is not what was written; the stage runs again", name, damaged)
            self._produced(name)

    def _keep(self, name: str, stamp: Stamp) -> None:
        """Write the stamp: the files' times and inodes as they are, their digests as of when they were written."""
        files = []
        for place, was in stamp.files:
            found = self._path(place).stat()
            files.append((place, replace(was, mtime_ns=found.st_mtime_ns, inode=found.st_ino)))
        stamp = self._stamps[name] = replace(stamp, files=tuple(files))
        save_text(self._stamp_path(name), _STAMP.dump_json(stamp, indent=1).decode() + "\n")

    def _stamp_path(self, name: str) -> Path:
        return self._outputs.cache / f"{name}.stamp.json"

    def _place(self, path: Path) -> Place:
        if path.is_relative_to(self._outputs.cache):
            return Place("cache", path.relative_to(self._outputs.cache).as_posix())
        if path in self._outputs.files:
            return Place("output", path.name)
        return Place("path", str(path))

    def _path(self, place: Place) -> Path:
        roots = {"cache": self._outputs.cache, "output": self._outputs.folder, "path": Path()}
        return roots[place.kind] / place.name

    def _placed(self, value: Any) -> Any:
        """``value`` with a place for every path."""
        if isinstance(value, Path):
            return {PLACE: asdict(self._place(value))}
        if isinstance(value, dict):
            return {key: self._placed(item) for key, item in value.items()}
        return [self._placed(item) for item in value] if isinstance(value, list | tuple) else value

    def _unplaced(self, value: Any) -> Any:
        """``value`` with the path of every place."""
        if isinstance(value, dict):
            if value.keys() == {PLACE}:
                return str(self._path(Place(**value[PLACE])))
            return {key: self._unplaced(item) for key, item in value.items()}
        return [self._unplaced(item) for item in value] if isinstance(value, list) else value


PLACE = "place"
_STAMP = TypeAdapter(Stamp)


def _replaced(value: Any, places: dict[Place, Place]) -> Any:
    """A stamp's value with every place that is in ``places`` replaced."""
    if isinstance(value, dict):
        if value.keys() == {PLACE}:
            old = Place(**value[PLACE])
            return {PLACE: asdict(places.get(old, old))}
        return {key: _replaced(item, places) for key, item in value.items()}
    return [_replaced(item, places) for item in value] if isinstance(value, list) else value


def _produced(name: str, produce: Callable[[Progress], T], progress: Progress, folder: Path) -> T:
    """``produce``'s value; what it does not explain itself becomes a StageError."""

    def report(what: str, done: int, total: int) -> None:
        parallel.raise_if_failed()
        progress(what, done, total)

    try:
        return produce(report)
    except DiskFullError:
        raise
    except Exception as error:
        if disk.is_full(error):
            log.exception("%s failed", name)
            raise disk.full(folder) from error
        if is_out_of_memory(error):
            log.exception("%s failed", name)
            raise out_of_memory(name, error) from error
        if isinstance(error, EngineError):
            raise StageError(name, error.cause, error.remedy) from None
        if isinstance(error, LynxError):
            raise
        log.exception("%s failed", name)
        raise StageError(
            name,
            f"{type(error).__name__}: {first_line(error)}.",
            "This is a bug; please report it with the log.",
        ) from error


def _forget_peak() -> None:
    """Let Linux count this process's most resident memory from now on; elsewhere it counts from the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> int | None:
    """The most resident memory since ``_forget_peak``; None where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _paths(value: Any) -> list[Path]:
    """Every file that a stage's value names; a folder stands for the files in it."""
    if isinstance(value, Path):
        return sorted(path for path in value.rglob("*") if path.is_file()) if value.is_dir() else [value]
    if isinstance(value, tuple | list):
        return [path for item in value for path in _paths(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [path for name in value.__dataclass_fields__ for path in _paths(getattr(value, name))]
    return []


def key_of(stage: StageVersion, *inputs: Any) -> str:
    """SHA-256 over the inputs of a stage and its version, whether it runs or not."""
    values = [TypeAdapter(type(x)).dump_python(x, mode="json") for x in inputs]
    text = json.dumps([stage.name, stage.number, *map(_installed, stage.packages), *values])
    return hashlib.sha256(text.encode()).hexdigest()


def _installed(package: str) -> list[str]:
    try:
        return [package, importlib.metadata.version(package)]
    except importlib.metadata.PackageNotFoundError:
        return [package, "none"]
