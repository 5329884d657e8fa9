# SPDX-License-Identifier: Apache-2.0
"""Prompts from files: what of a pipeline's arguments is each prompt's own."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

from lynx_compile.errors import InputError, first_line

TEXTS = (".txt", "")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FEWEST = 16  # different prompts of which some can be spared
HELD_OUT = 8  # one of so many is kept apart
MOST_HELD_OUT = 64
KINDS = (
    "text (.txt, a prompt a line), .csv or .yaml with columns named as the pipeline's arguments, or .safetensors"
    " with a row a prompt"
)


def read(path: Path) -> list[dict[str, Any]]:
    """Per prompt, the arguments of the pipeline's call that are its own.

    Text: ``prompt``, a line each. CSV: a header with the names of arguments, ``prompt`` among them. YAML: a list of
    prompts, or of mappings of arguments; what looks like a number stays text. Safetensors: encoded prompts, tensors
    [prompts, ...] named as the arguments. A value that names an image file becomes that image; its path is relative
    to the file.

    Raises:
        InputError: the file cannot be read, is of another kind, or holds no prompt.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        rows = _encoded(path)
    elif suffix in (".yaml", ".yml"):
        rows = _of_yaml(path)
    elif suffix == ".csv":
        rows = _of_csv(path)
    elif suffix in TEXTS:
        rows = [{"prompt": line} for line in (line.strip() for line in _text(path).split("\n")) if line]
    else:
        raise InputError(f"{path} is no file of prompts: '{suffix}' is not known.", f"Give {KINDS}.")
    if not rows:
        raise InputError(f"{path} holds no prompt.", "Give at least two, of different length.")
    return [{name: _with_images(value, path.parent) for name, value in row.items()} for row in rows]


@dataclass(frozen=True)
class Split:
    """Positions of the rows that calibration may run, and of those kept apart, from which errors are reported.

    ``shared``: there are too few to keep any apart, so that errors are on other noise of the same prompts.
    """

    calibration: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def shared(self) -> bool:
        return self.calibration == self.held_out


def split(rows: Sequence[Mapping[str, Any]], held_out: int | None = None) -> Split:
    """Keep prompts apart, drawn at random: the same ones of the same rows, and equal rows on one side.

    Args:
        rows: as ``read`` returns them.
        held_out: so many different prompts; by default an eighth of them, ``MOST_HELD_OUT`` at most, and none of fewer
            than ``FEWEST``. One always stays for calibration.
    """
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        places.setdefault(digest_of([row]), []).append(number)
    if held_out is None:
        held_out = min(len(places) // HELD_OUT, MOST_HELD_OUT) if len(places) >= FEWEST else 0
    order = random.Random(0).sample(list(places), min(held_out, len(places) - 1))
    out = {number for key in order for number in places[key]}
    everything = range(len(rows))
    left = tuple(number for number in everything if number not in out)
    return Split(left, tuple(sorted(out)) or left)


def of_node(node: yaml.Node, path: Path) -> list[dict[str, Any]]:
    """Prompts from the YAML node of their list in ``path``: 016 is a prompt there, and no number.

    Raises:
        InputError: it is no list of texts or of mappings. The message names the file and the line.
    """
    if not isinstance(node, yaml.SequenceNode):
        raise InputError(f"{path}:{node.start_mark.line + 1}: prompts are a list.", "Start each with '- '.")
    return [_row(item, path) for item in node.value]


def digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over what ``read`` returned: images that a file of prompts names are in it, by their content."""
    digest = hashlib.sha256()
    update_digest(digest, rows)
    return digest.hexdigest()


def update_digest(digest: Any, value: Any) -> None:
    """Into the digest: tensors and images by their content, the rest as text."""
    if isinstance(value, Mapping):
        update_digest(digest, [[str(name), item] for name, item in sorted(value.items())])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            update_digest(digest, item)
    elif isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        digest.update(f"{array.dtype} {tuple(array.shape)} ".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    elif hasattr(value, "tobytes"):  # images
        digest.update(
            f"{getattr(value, 'mode', '')} {getattr(value, 'size', '')} ".encode() + value.tobytes()
        )
    else:
        digest.update(f"{type(value).__name__} {value!r} ".encode())


def _row(node: yaml.Node, path: Path) -> dict[str, Any]:
    value = _plain(node)
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        return value
    raise InputError(
        f"{path}:{node.start_mark.line + 1}: a prompt is a text, or a mapping of the pipeline's arguments.",
        "Correct it.",
    )


def _plain(node: yaml.Node) -> Any:
    """Texts, lists and mappings: a scalar is what stands there, whatever it looks like."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return str(node.value)


def _of_yaml(path: Path) -> list[dict[str, Any]]:
    try:
        node = yaml.compose(_text(path), Loader=yaml.SafeLoader)
        return of_node(node, path) if node is not None else []
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML ({first_line(error)}).", "Correct the file.") from None


def _of_csv(path: Path) -> list[dict[str, Any]]:
    """Every column is an argument; the header has to say so, or the first prompt would be lost."""
    lines = csv.DictReader(_text(path).split("\n"), strict=True)
    try:
        rows = list(lines)
    except csv.Error as error:
        raise InputError(
            f"{path}:{lines.line_num}: this is not CSV ({error}).", "Correct the file."
        ) from None
    names = lines.fieldnames or []
    if "prompt" not in names:
        raise InputError(
            f"{path} has no column 'prompt' (its first line is '{','.join(names)[:60]}').",
            "Name the columns as the pipeline's arguments, or give a .txt with a prompt a line.",
        )
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(
                f"{path}: row {number} does not have {len(names)} columns.", "Quote commas in prompts."
            )
    return [dict(row) for row in rows if row["prompt"].strip()]


def _encoded(path: Path) -> list[dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist.", "Check the path.") from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({first_line(error)}).", "Write it with safetensors."
        ) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            raise InputError(
                f"{path}: '{name}' is {str(tensor.dtype)[6:]}, in which text embeddings lose most of their digits.",
                "Write it in the dtype that the text encoder gave (bf16, fp16 or fp32).",
            )
    counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        raise InputError(
            f"{path}: the tensors do not have the same number of rows ({counts}).", "A row is a prompt."
        )
    return [_encoded_row(tensors, i) for i in range(next(iter(counts.values()), 0))]


def _encoded_row(tensors: Mapping[str, torch.Tensor], row: int) -> dict[str, Any]:
    return {name: tensor[row : row + 1].clone() for name, tensor in tensors.items()}


def _with_images(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_with_images(item, folder) for item in value]
    if not isinstance(value, str) or not value.lower().endswith(IMAGES) or "\n" in value:
        return value
    path = folder / value
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:  # PIL's own error for what is no image is one
        raise InputError(
            f"The image {path} cannot be read ({first_line(error)}).", "Check the path."
        ) from None


def _text(path: Path) -> str:
    """The file as text with plain line ends. A byte order mark is no part of the first prompt."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8; prompts are a line each."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from None
