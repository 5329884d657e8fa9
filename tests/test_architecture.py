# SPDX-License-Identifier: Apache-2.0
"""Imports point downwards: what each part of the package may know, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lynx_compile"
# Each line may import itself and the lines below it.
LAYERS = (
    ("cli", "__main__"),
    ("pipeline",),
    ("tools",),
    ("passes",),
    ("torch_ops",),
    ("models",),
    ("recipe",),
    ("engine",),
    ("solve",),
    ("ops",),
    ("files",),
    ("parallel",),
    ("extras",),
    ("errors",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# The folder that a deployed program imports: no compiler, no framework. The drop-in is for torch pipelines.
DEPLOYED_WITHOUT = {"torch", "diffusers", "transformers", "yaml", "onnx", "typer", "rich"}
TORCH_IN_ENGINE = {"module.py"}
SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE
)


def imported(source: str) -> Iterator[str]:
    """Dotted names of the modules that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    """The layer's name of a file or a dotted name's first part below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upward(path: Path) -> list[str]:
    """What a file imports from above its own layer."""
    names = [name.split(".")[1] for name in imported(path.read_text()) if name.startswith("lynx_compile.")]
    return sorted({name for name in names if name in LEVEL and LEVEL[name] < LEVEL[part_of(path)]})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    assert part_of(path) in LEVEL, "a new part of the package needs its layer"
    assert upward(path) == []


def test_an_upward_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "ops" / "wrong.py"
    path.parent.mkdir()
    path.write_text(
        "def f():\n    from lynx_compile.passes.select import select\n    import lynx_compile.errors\n"
    )
    assert upward(path) == ["passes"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").glob("*.py")), ids=lambda path: path.name)
def test_the_deployed_part_needs_no_framework(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path.read_text())}
    allowed = {"torch"} if path.name in TORCH_IN_ENGINE else set()
    assert roots & DEPLOYED_WITHOUT <= allowed
