# SPDX-License-Identifier: Apache-2.0
"""YAML without surprises: text stays text, numbers are decimal, and what could mean two things is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lynx_compile.errors import InputError, first_line


def parse(path: Path, text: str) -> tuple[Any, yaml.Node | None]:
    """The values of a YAML text, and its nodes, which know their lines.

    YAML 1.1 reads 016 as 14, 16:9 as 969, ``no`` as false and 1e-3 as text; here the first and third are refused, the
    second stays text and the last is a number. Tags, aliases and repeated keys are refused.

    Raises:
        InputError: it is no such YAML. The message names ``path``, the line and what to write instead.
    """
    try:
        _refuse_aliases(path, text)
        node = yaml.compose(text, Loader=_Loader)
        _refuse_duplicates(path, node)
        for scalar in _values(node):
            _refuse_ambiguous(path, scalar)
        return yaml.load(text, Loader=_Loader), node
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _explained(path, text, error) from None


class _Loader(yaml.SafeLoader):
    """Plain scalars as YAML 1.2's core schema has them, less its octal and hexadecimal numbers."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))

_NUMBER = re.compile(r"[-+]?(0[0-9_]+|0[xob][0-9a-fA-F_]+|[1-9][0-9]*(_[0-9]+)+)")
_SWITCH = re.compile(r"yes|no|on|off", re.IGNORECASE)
_ALIAS = re.compile(r"\*[^\s,\]}]*")


def _refuse_aliases(path: Path, text: str) -> None:
    """Nothing here needs them, and few of them expand to gigabytes."""
    for token in yaml.scan(text, Loader=_Loader):
        if isinstance(token, yaml.AliasToken):
            raise _alias(f"{path}:{token.start_mark.line + 1}", f"*{token.value}")


def _alias(where: str, text: str) -> InputError:
    return InputError(
        f"{where}: YAML takes {text} for an alias, since it begins with *.", f"Quote it: '{text}'."
    )


def _refuse_duplicates(path: Path, node: yaml.Node | None) -> None:
    """A later key replaces no earlier one."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            line = key.start_mark.line + 1
            raise InputError(f"{path}:{line}: the key '{key.value}' is there twice.", "Keep one of them.")
        seen.add(str(key.value))
        _refuse_duplicates(path, value)


def _values(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Every scalar that is no key."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _values(item)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _values(value)


def _refuse_ambiguous(path: Path, node: yaml.ScalarNode) -> None:
    """Numbers and switches that YAML's versions and people read differently, unless they are quoted; and NUL, of which
    no path can have one."""
    where, text = f"{path}:{node.start_mark.line + 1}", node.value
    if "\0" in text:
        raise InputError(f"{where}: the value holds a NUL character.", "Remove it.")
    if node.style is not None:
        return
    if _NUMBER.fullmatch(text):
        raise InputError(
            f"{where}: {text} can be read as more than one number.",
            f"Write it in decimal digits alone, without leading zeros; or quote it if it is text: '{text}'.",
        )
    if _SWITCH.fullmatch(text):
        meant = "true" if text.lower() in ("yes", "on") else "false"
        raise InputError(
            f"{where}: {text} is read differently by YAML's versions.",
            f"Write {meant}; or quote it if it is text: '{text}'.",
        )


def _explained(path: Path, text: str, error: Exception) -> InputError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = getattr(error, "problem", None) or first_line(error)
    if getattr(error, "context", None) == "while scanning an alias":
        found = _ALIAS.search(text.splitlines()[error.context_mark.line], error.context_mark.column)  # type: ignore[attr-defined]
        return _alias(where, found[0].rstrip(":") if found else "*")
    remedies = {
        "found character '\\t'": "Indent with spaces, not tabs.",
        "found character": "Quote the value.",
        "mapping values are not allowed": "Indent the keys of one section alike, and quote values that hold ': '.",
        "could not find expected ':'": "Write 'key: value', with a space behind the colon.",
        "expected <block end>": "Indent the keys of one section alike.",
    }
    remedy = next(
        (text for start, text in remedies.items() if problem.startswith(start)), "Correct the file."
    )
    return InputError(f"{where}: this is not valid YAML ({problem}).", remedy)
