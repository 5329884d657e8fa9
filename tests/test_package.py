# SPDX-License-Identifier: Apache-2.0
"""What is installed: the base install runs an engine, an extra brings what its part imports, and the wheel is whole."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lynx_compile import __main__, extras
from lynx_compile.extras import MODULES
from tests.plugins.native import LIBRARY
from tests.test_architecture import PACKAGE

ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = {"cuda", "ml_dtypes", "numpy", "pydantic"}
COMPILING = ("check", "compile", "init", "inspect", "report")  # what needs no more than compiling
# Where each extra's part begins. The modules of the extra below it are not asked for again.
PARTS = {
    "torch": ("", ["engine.module", "torch_ops.apply"]),
    "compile": ("torch", [f"cli.{name}" for name in COMPILING]),
    "compare": ("compile", ["cli.compare", "tools.polygraphy_launcher"]),
    "bench": ("compare", ["cli.bench", "cli.study"]),
}
BY_NAME = {"torch": {"diffusers"}}  # engine/calls.py imports the classes that a manifest names

RUNTIME_ALONE = """
import sys

before = set(sys.modules)
for name in sys.argv[1:]:
    sys.modules[name] = None  # as if it were not installed
import lynx_compile
from lynx_compile.engine import cuda, runtime
from lynx_compile.errors import InputError

cuda.bindings()
try:
    lynx_compile.load("flux.engine")
except InputError as error:
    print(error)
new = {name: module for name, module in sys.modules.items() if name not in before}
installed = {name for name, module in new.items() if "site-packages" in (getattr(module, "__file__", None) or "")}
print(*{name.split(".")[0] for name in installed})
"""


def _statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """What runs when a module is imported."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for inner in ("body", "orelse", "handlers"):
            if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield from _statements(getattr(statement, inner, []))


def _imported(name: str, *, later: bool) -> set[str]:
    """Dotted names that a module of the package imports. ``later``: in functions too."""
    path = PACKAGE.joinpath(*name.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    found = set()
    for node in ast.walk(tree) if later else _statements(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _ours(dotted: str) -> Iterator[str]:
    """The modules of the package that importing a dotted name imports, from the package down."""
    parts = dotted.split(".")
    for count in range(2, len(parts) + 1):
        path = PACKAGE.joinpath(*parts[1:count])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            yield ".".join(parts[1:count])


def _third_party(starts: list[str]) -> set[str]:
    """Top names of what modules import of others, with what they import of ours.

    What functions import counts in ``starts``, which are commands, and in what those import: it is run for sure.
    """
    found, seen, todo = set(), set(), [(name, 0) for name in starts]
    for name, depth in todo:
        if name in seen:
            continue
        seen.add(name)
        for dotted in _imported(name, later=depth < 2):
            if dotted.split(".")[0] == "lynx_compile":
                todo += [(each, depth + 1) for each in _ours(dotted)]
            else:
                found.add(dotted.split(".")[0])
    return found - sys.stdlib_module_names


def _declared(requirements: list[str]) -> set[str]:
    """Distributions of a list of ``pyproject.toml``, as modules are spelled."""
    names = {re.split(r"[\[<>=~]", line)[0].lower().replace("-", "_") for line in requirements}
    return {{"pillow": "PIL", "pyyaml": "yaml", "cuda_bindings": "cuda"}.get(name, name) for name in names}


@pytest.mark.parametrize("extra", PARTS)
def test_an_extra_brings_what_its_part_imports(extra: str) -> None:
    below, starts = PARTS[extra]
    own = set(MODULES[extra]) - set(MODULES.get(below, ()))
    found = _third_party(starts) | BY_NAME.get(extra, set())
    assert found - BASE - set(MODULES.get(below, ())) == own
    assert _declared(PROJECT["optional-dependencies"][extra]) - {"lynx_compile", "transformers"} == own


def test_the_base_install_runs_an_engine() -> None:
    assert _declared(PROJECT["dependencies"]) == BASE
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME_ALONE, *MODULES["bench"]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    error, loaded = done.stdout.splitlines()
    assert error == (
        "lynx_compile.load needs diffusers, safetensors, torch. Run: pip install 'lynx_compile[torch]'"
    )
    of_pydantic = {"pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert BASE <= set(loaded.split()) <= BASE | of_pydantic


def test_a_command_names_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "polygraphy" else name)
    for arguments in (["compare", "a.engine"], ["bench"]):
        monkeypatch.setattr(sys, "argv", ["lynx-compile", *arguments])
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        assert caught.value.code == 2
        assert capsys.readouterr().err == (
            f"error: lynx-compile {arguments[0]} needs polygraphy. "
            f"Run: pip install 'lynx_compile[{arguments[0]}]'\n"
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``make wheel`` makes it, of the library that is there."""
    folder = tmp_path_factory.mktemp("wheel")
    settings = {"build-dir": folder / "cmake", "cmake.define.LYNX_PREBUILT": LIBRARY.parent}
    _run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "dist", ROOT,
        *(f"-C{key}={value}" for key, value in settings.items()),
    )  # fmt: skip
    (built,) = (folder / "dist").iterdir()
    return built


def _run(*command: str | Path, cwd: Path | None = None, code: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert re.fullmatch(r"lynx_compile-[\d.]+-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert archive.read("lynx_compile/lib/liblynx_plugin.so") == LIBRARY.read_bytes()
    tracked = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", "lynx_compile", cwd=ROOT)
    libraries = {"lynx_compile/lib/liblynx_plugin.so", "lynx_compile/lib/rtx_alias/libtensorrt_rtx.so"}
    assert {name for name in names if ".dist-info/" not in name} == {*tracked.splitlines(), *libraries}
    assert {"lynx_compile/py.typed", "lynx_compile/data/prompts.txt"} <= names


@pytest.mark.slow
def test_the_wheel_compiles_where_nothing_else_of_ours_is(wheel: Path, tiny: Path, tmp_path: Path) -> None:
    environment = tmp_path / "empty"
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    python, command = environment / "bin" / "python", environment / "bin" / "lynx-compile"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    arguments = (tiny / "tiny.yaml", "-o", tmp_path / "tiny.engine")
    said = _run(command, *arguments, cwd=tmp_path, code=2)
    assert said.startswith("error: lynx-compile needs diffusers, ") and "'lynx_compile[compile]'" in said

    # The packages of this environment, but none of its .pth files, which lead to these sources.
    (packages,) = (environment / "lib").glob("python3*/site-packages")
    others = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    source = _run(python, "-c", "import lynx_compile; print(lynx_compile.__file__)", cwd=tmp_path)
    assert Path(source.strip()) == packages / "lynx_compile" / "__init__.py"
    _run(python, "-m", "lynx_compile", *arguments, cwd=tmp_path)
    assert (tmp_path / "tiny.liblynx_plugin.so").read_bytes() == LIBRARY.read_bytes()
