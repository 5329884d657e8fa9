# SPDX-License-Identifier: Apache-2.0
"""Writes docs/recipe.md from the JSON schema of the recipe's pydantic model: ``python -m docs.recipe_reference``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lynx_compile.files.atomic import save_text
from lynx_compile.recipe import Recipe

PAGE = Path(__file__).parent / "recipe.md"
Schema = dict[str, Any]

BEGINNING = """\
# Recipe reference

Written from `lynx_compile/recipe.py` by `make docs`: every key, its type and default. A recipe is YAML; `model` is
all that it must have. Paths are relative to the recipe. An unknown key is an error, which names file, line and key.
What decides by which key is told in [how it works](how-it-works.md), what a change runs again in
[which change reruns what](reruns.md).

```yaml
model:
  source: black-forest-labs/FLUX.1-dev
call:
  height: 1024
  width: 1024
  num_inference_steps: 28
  guidance_scale: 3.5
  max_sequence_length: 512
```
"""
NAMES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
}
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


def page() -> str:
    """The whole page, Markdown."""
    schema = Recipe.model_json_schema()
    lines = [BEGINNING]
    for name, section in schema["properties"].items():
        forms = list(_forms(section, schema["$defs"]))
        if not forms:
            lines.append(f"## {name}\n\n{_prose(section)}\n")
        for form in forms:
            lines.append(f"## {name}{_told_apart(form, forms)}\n\n{_prose(form)}\n")
            lines += [*_keys(form, schema["$defs"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _forms(section: Schema, definitions: Schema) -> Iterator[Schema]:
    """What a section may be; nothing where it is a mapping of any keys."""
    for branch in section.get("oneOf") or section.get("anyOf") or [section]:
        if "$ref" in branch:
            yield definitions[branch["$ref"].rpartition("/")[2]]


def _told_apart(form: Schema, forms: list[Schema]) -> str:
    """One of several forms is told by its first key."""
    return f", by `{next(iter(form['properties']))}`" if len(forms) > 1 else ""


def _keys(section: Schema, definitions: Schema, indent: str = "") -> Iterator[str]:
    """A line for each key; behind one that lists mappings, theirs."""
    for name, value in section["properties"].items():
        yield indent + _key(name, value, section)
        for item in _forms(value.get("items", {}), definitions):
            yield from _keys(item, definitions, indent + "    ")


def _key(name: str, value: Schema, section: Schema) -> str:
    required = name in section.get("required", ())
    default = "required" if required else f"default `{_yaml(value.get('default', {}))}`"
    return f"- **`{name}`** ({_type(value)}; {default}): {_prose(value)}"


def _type(value: Schema) -> str:
    if branches := value.get("oneOf") or value.get("anyOf"):
        return " or ".join(map(_type, branches))
    if words := value.get("enum") or ([value["const"]] if "const" in value else []):
        return " or ".join(f"`{_yaml(word)}`" for word in words)
    if "$ref" in value:
        return "mappings"
    if value["type"] == "array":
        return f"a list of {_type(value['items'])}"
    if value["type"] == "object":
        of = value.get("additionalProperties")
        return f"a mapping to {_type(of)}" if isinstance(of, dict) else "a mapping"
    bounds = (words.format(value[key]) for key, words in BOUNDS.items() if key in value)
    return f"{NAMES[value['type']]} {', '.join(bounds)}".rstrip()


def _yaml(value: Any) -> str:
    """As YAML has it, on one line."""
    if isinstance(value, list) and all(isinstance(item, str) and item.isalnum() for item in value):
        return f"[{', '.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def _prose(value: Schema) -> str:
    """A description on one line; asterisks of globs are none of Markdown's."""
    return " ".join(value.get("description", "").replace("``", "`").replace("*", r"\*").split())


if __name__ == "__main__":
    save_text(PAGE, page())
