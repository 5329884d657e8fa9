# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile init``: a recipe for a pipeline, each key with its default and its description from ``recipe``."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lynx_compile.errors import InputError
from lynx_compile.models.pipeline_loader import pipeline_class
from lynx_compile.models.source import read_index
from lynx_compile.recipe import HUB_ID, Model, Recipe, Section

WIDTH = 110
SIZES = ("height", "width", "num_frames")  # which some classes work out themselves where they are None
NOT_OURS = ("return_dict", "callback_steps", "output_type")  # how a pipeline returns, not what it does


def written(source: str) -> str:
    """The text of a recipe.

    Args:
        source: hub id, page of the hub or local folder of a pipeline of diffusers. Its ``model_index.json`` is read.

    Raises:
        InputError: it is none of them, cannot be reached, or its class is not in the installed diffusers.
    """
    if not HUB_ID.match(source) and "://" not in source and not Path(source).expanduser().exists():
        raise InputError(
            f"The model folder {source} does not exist.", "Give a folder or a hub id (owner/name)."
        )
    try:
        model = Model(source=source).resolved(Path.cwd())
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{source}: {reason}.", "Give a hub id (owner/name) or a local folder.") from None
    kind = pipeline_class(read_index(model.source, model.revision).get("_class_name"), model.source)
    lines = [f"# {kind.__name__} of {model.source}: every key, at its default.", *_section("model", model)]
    lines += _comment(
        f"{Recipe.model_fields['call'].description} Here at the defaults of {kind.__name__}.", ""
    )
    lines += ["call:", *_call(kind)]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, Section):
            lines += _section(name, field.default)
    return "\n".join(lines) + "\n"


def _section(name: str, section: Section) -> Iterator[str]:
    yield from _comment(inspect.getdoc(type(section)) or "", "")
    yield f"{name}:"
    for key, field in type(section).model_fields.items():
        yield from _described(_yaml(key, getattr(section, key)), field.description or "")


def _call(kind: type) -> Iterator[str]:
    """What decides the shapes and the trajectory: numbers and switches, not prompts, tensors or callbacks."""
    for name, parameter in inspect.signature(kind.__call__).parameters.items():
        if name.startswith("_") or name.endswith("_per_prompt") or name in NOT_OURS:
            continue
        if isinstance(parameter.default, bool | int | float):
            yield f"  {_yaml(name, parameter.default)}"
        elif name in SIZES and parameter.default is None:
            yield f"  # {name}:  # the pipeline's own choice, unless you give one"


def _described(line: str, description: str) -> Iterator[str]:
    """The description behind a key where there is room for it, else above."""
    text = " ".join(description.split())
    if len(line) + len(text) + 6 <= WIDTH:
        yield f"  {line}  # {text}"
        return
    yield from _comment(text, "  ")
    yield f"  {line}"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=start, subsequent_indent=start)


def _yaml(key: str, value: Any) -> str:
    """One line of it."""
    plain = [list(value) if isinstance(value, tuple) else value]
    return f"{key}: {yaml.safe_dump(plain, default_flow_style=True, width=float('inf')).strip()[1:-1]}"
