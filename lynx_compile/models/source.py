# SPDX-License-Identifier: Apache-2.0
"""From a recipe's ``source`` to a local folder: a folder as it is, a hub id from its cache or the hub."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from lynx_compile.errors import InputError, first_line
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.models.checkpoint import read_json, unquantized_config
from lynx_compile.models.weight_files import refuse_other_formats

INDEX = "model_index.json"
WEIGHTS = re.compile(
    r"[^/]*?(\.(?P<variant>[a-z]+\d+))?(-\d{5}-of-\d{5})?(\.(?P<late>[a-z]+\d+))?"
    r"\.safetensors(\.index(\.(?P<index>\w+))?\.json)?"
)

log = logging.getLogger(__name__)


def fetch(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    components: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Path:
    """The folder of a diffusers pipeline or model.

    Args:
        source: an absolute folder, or a hub id, whose files are taken from the hub's cache where they are there.
        variant: of the weights (``fp16``); where the repository has none for a component, its plain ones are taken.
        components: of the pipeline, those to fetch; None: all of them.

    Raises:
        InputError: there is no such folder or repository, it cannot be reached, or it holds no diffusers model.
    """
    path = Path(source)
    if not path.is_absolute():
        return _fetched(source, revision, variant, components, progress)
    if not path.exists():
        raise InputError(f"The model folder {path} does not exist.", "Correct model.source in the recipe.")
    if path.is_file():
        raise _single_file(path)
    if not (path / INDEX).exists() and not (path / "config.json").exists():
        _refuse_bare(path)
    return path


def download_bytes(source: str, revision: str | None, variant: str | None) -> int:
    """Bytes of a hub id's files that are not in the hub's cache; 0 where the hub cannot be asked."""
    try:
        found = HfApi().model_info(source, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
        parts = None
        if INDEX in sizes:
            parts = list(_parts(read_json(Path(hf_hub_download(source, INDEX, revision=revision)))))
    except Exception:  # huggingface_hub raises many kinds; ``fetch`` explains them
        return 0
    wanted = _wanted(list(sizes), parts, variant)
    return sum(
        sizes[name]
        for name in wanted
        if not isinstance(try_to_load_from_cache(source, name, revision=revision), str)
    )


def read_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """A pipeline's ``model_index.json``; of a hub id nothing else is downloaded.

    Raises:
        InputError: there is no such folder or repository, it cannot be reached, or holds no pipeline.
    """
    if Path(source).is_absolute():
        return _index(fetch(source))
    try:
        return read_json(Path(hf_hub_download(source, INDEX, revision=revision)))
    except Exception as error:  # huggingface_hub raises many kinds
        return _index(_cached(source, revision, first_line(error)))


def pipeline_parts(folder: Path) -> dict[str, tuple[str, str]]:
    """The components of a pipeline that its ``model_index.json`` names: {component: (library, class)}.

    Raises:
        InputError: the index is missing or damaged, or a component's folder is missing or holds only pickles.
    """
    parts = _parts(_index(folder))
    for name, (_, class_name) in parts.items():
        if not (folder / name).is_dir():
            raise InputError(
                f"{folder} has no folder '{name}' ({class_name}), which its {INDEX} names and its pipeline runs with.",
                f"Fetch or copy the folder '{name}' of the checkpoint.",
            )
        _see_files(folder / name)
    return parts


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        raise InputError(
            f"{folder} holds a model and no pipeline ({INDEX} is missing).",
            "Give the whole diffusers pipeline, whose own loop is run for calibration, or 'recording' under "
            "'calibration'.",
        )
    return read_json(folder / INDEX)


def only_variant(folder: Path, names: Iterable[str]) -> str | None:
    """The variant in whose files alone one of a pipeline's components is there; None: each has plain ones.

    Diffusers takes one variant for all, and the plain files of components that do not have it.
    """
    for name in sorted(names):
        matches = [WEIGHTS.fullmatch(path.name) for path in sorted((folder / name).iterdir())]
        found = {_variant_of(match) for match in matches if match}
        if found and None not in found:
            return min(variant for variant in found if variant)
    return None


def _variant_of(match: re.Match[str]) -> str | None:
    return match["variant"] or match["late"] or match["index"]


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        name: (str(value[0]), str(value[1]))
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and None not in value
    }


def _see_files(folder: Path) -> None:
    """Every link of a component's folder leads to a file, and its weights are no pickles, nor quantized."""
    files = sorted(folder.iterdir())
    for path in files:
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path} is a link to {path.readlink()}, which is not there: a download that was not finished, or a "
                "cache that was moved.",
                "Fetch the checkpoint again.",
            )
    if not any(path.suffix == ".safetensors" for path in files):
        refuse_other_formats(folder, [path for path in files if path.name != "adapter_config.json"])
    if folder / "config.json" in files:
        unquantized_config(folder / "config.json")


def _fetched(
    source: str,
    revision: str | None,
    variant: str | None,
    components: Sequence[str] | None,
    progress: Progress,
) -> Path:
    if constants.HF_HUB_OFFLINE:
        return _cached(source, revision, "HF_HUB_OFFLINE is set")
    try:
        files = HfApi().list_repo_files(source, revision=revision)
        parts = None
        if INDEX in files:
            index = hf_hub_download(source, INDEX, revision=revision)
            parts = [
                name for name in _parts(read_json(Path(index))) if components is None or name in components
            ]
        wanted = _wanted(files, parts, variant)
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=wanted, tqdm_class=_bar(progress))
        )
    except InputError:
        raise
    except (
        Exception
    ) as error:  # huggingface_hub raises many kinds: gated, unknown id, bad revision, no network
        return _cached(source, revision, first_line(error))


def _cached(source: str, revision: str | None, reason: str) -> Path:
    """The snapshot in the hub's cache, whose completeness is seen when its files are opened."""
    for name in (INDEX, "config.json"):
        found = try_to_load_from_cache(source, name, revision=revision)
        if isinstance(found, str):
            log.warning("'%s' is taken from the hub's cache (%s)", source, reason)
            return Path(found).parent
    raise InputError(
        f"The model '{source}' could not be fetched from the hub ({reason.rstrip('.')}).",
        "Check the id, log in with 'hf auth login' if it is gated, or give a local diffusers folder.",
    )


def _wanted(files: Sequence[str], parts: Sequence[str] | None, variant: str | None) -> list[str]:
    """The files of a repository that a pipeline (or, without ``parts``, a model) is loaded from.

    Weights of one variant alone: the asked one, else the plain ones; where a component has not that, whatever it has.
    Files outside the components' folders are other copies of the same weights, and code is not wanted.
    """
    wanted = [name for name in (INDEX,) if parts is not None and name in files]
    for folder in [""] if parts is None else [f"{name}/" for name in parts]:
        inside = [name for name in files if name.startswith(folder) and "/" not in name[len(folder) :]]
        weights = {name: match for name in inside if (match := WEIGHTS.fullmatch(name[len(folder) :]))}
        variants = {name: _variant_of(match) for name, match in weights.items()}
        chosen = variant if variant in variants.values() else None
        if chosen is None and None not in variants.values():
            wanted += variants
        wanted += [name for name, found in variants.items() if found == chosen]
        others = (name for name in inside if name not in weights)
        wanted += [
            name
            for name in others
            if Path(name).suffix in (".json", ".txt", ".model", ".jinja", ".jsonl", ".tiktoken")
        ]
    return list(dict.fromkeys(wanted))


def _bar(progress: Progress) -> type[Any]:
    """A tqdm class that shows nothing itself, and hands the bytes of all files to ``progress``."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            self._of_bytes = settings.get("unit") == "B"
            super().__init__(*args, **{**settings, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self._of_bytes and self.n:
                done = int(self.n)
                mega = [-(-size // 10**6) for size in (done, max(int(self.total or 0), done))]
                progress("MB downloaded", *mega)
            return shown

    return Bar


def _single_file(path: Path) -> InputError:
    try:
        refuse_other_formats(path.parent, [path])
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except InputError as error:
        return error
    except (OSError, SafetensorError):
        return InputError(f"{path} is a file and no model folder.", "Give a diffusers folder or a hub id.")
    example = keys[0] if keys else "no tensor"
    return InputError(
        f"{path} holds weights alone ('{example}'), without the config and the pipeline that they belong to.",
        "Give the folder of the diffusers pipeline, with this file in its 'transformer' folder in place of the weights "
        "there; a layout that diffusers can convert is converted.",
    )


def _refuse_bare(folder: Path) -> None:
    """A folder without any config: say what it holds instead."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    refuse_other_formats(folder, files)
    weights = [path for path in files if path.suffix == ".safetensors"]
    if len(weights) == 1:
        raise _single_file(weights[0])
    raise InputError(
        f"{folder} is no diffusers folder: it holds neither {INDEX} nor config.json.",
        "Give the folder that save_pretrained wrote, or a hub id.",
    )
