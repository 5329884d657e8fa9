# SPDX-License-Identifier: Apache-2.0
"""README and docs: every command is run by a test or by CI or is marked as not run, and what pages quote is so.

``mkdocs build --strict`` in ``make lint`` checks links, anchors and pictures.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

import lynx_compile
from docs import recipe_reference
from lynx_compile import cli
from lynx_compile.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "# not run here: "
INDENTED = re.compile(r"^(?: {4}|\t)\s*(?:lynx-|make |pip |python |cmake |torchrun |hf )", re.MULTILINE)
# Of lines that no test here runs, the tests that do: a pattern, and the file with something that must be in it.
ELSEWHERE = {
    r"lynx-polygraphy (inspect model|run|convert|debug reduce) .*": (
        "tools/test_polygraphy_launcher.py",
        "debug",
    ),
    r"torchrun --nproc-per-node 2 -m lynx_compile .*": ("test_parallel.py", "torchrun"),
    r"\.venv/bin/cmake --install build/runtime --prefix .*": ("runtime_cpp/test_package.py", '"--install"'),
}

MODULES = ["python -m calib.digits_flux.seed seed.safetensors"]  # run here
QUICK = [  # run here, since they take no second
    "lynx-compile init model -o model.yaml",
    "lynx-compile check digits-flux.yaml",
    "lynx-compile bench -o out",
]
COMMANDS = {  # what runs them with other arguments
    "compile": ("test_cli.py", "tiny.yaml"),
    "init": ("test_commands.py", "init"),
    "check": ("passes/test_forecast.py", "check"),
    "inspect": ("tools/test_inspection.py", "inspect"),
    "compare": ("tools/test_compare.py", "compare"),
    "report": ("test_commands.py", "report"),
    "study": ("tools/test_study.py", "study"),
    "bench": ("tools/test_bench.py", "bench"),
}


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            if match["language"] in languages:
                yield Block(page, match["language"], match["text"])


def commands(block: Block) -> list[str]:
    """Its lines, continued ones as one, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [" ".join(words) for line in lines if (words := shlex.split(line, comments=True))]


RUN = [(b.page, c) for b in blocks("bash") if not b.text.startswith(NOT_RUN) for c in commands(b)]
SHOWN = [(b.page, c) for b in blocks("bash") for c in commands(b)]


def test_blocks_say_what_they_are_and_commands_stand_in_them() -> None:
    known = {"bash", "cmake", "cpp", "python", "text", "yaml"}
    for page in PAGES:
        assert {match["language"] for match in FENCE.finditer(page.read_text())} <= known, page
        assert not INDENTED.search(page.read_text()), f"{page}: a command outside of a block"
    assert len(RUN) > 15 and len(SHOWN) > len(RUN)


@pytest.mark.parametrize(
    ("page", "line"), RUN, ids=lambda value: value.name if isinstance(value, Path) else value
)
def test_a_command_is_covered(page: Path, line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "make":
        assert set(arguments) <= run_by_ci(), f"{page}: CI does not run {line}; mark it '{NOT_RUN}...'"
    elif program == "lynx-compile":
        name = parse(arguments)
        assert re.search(COMMANDS[name][1], (ROOT / "tests" / COMMANDS[name][0]).read_text())
    elif line not in MODULES:
        file, mark = next(
            (where for pattern, where in ELSEWHERE.items() if re.fullmatch(pattern, line)), ("", "")
        )
        assert file, f"{page}: nothing runs {line!r}; say what does in ELSEWHERE, or mark it '{NOT_RUN}...'"
        assert mark in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page, line in SHOWN if line.startswith("lynx-compile ")],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_options_are_those_of_the_command(page: Path, line: str) -> None:
    """Marked ones too: parsed, and not run."""
    parse(shlex.split(line)[1:])


def parse(arguments: list[str]) -> str:
    """As the command does, up to running it; the name of the one that would run."""
    group = typer.main.get_command(cli.app)
    context = group.make_context("lynx-compile", list(arguments), resilient_parsing=False)
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest, parent=context)
    return str(name)


def test_every_option_stands_on_a_page() -> None:
    """By one of its names."""
    group = typer.main.get_command(cli.app)
    text = "".join(page.read_text() for page in PAGES)
    for name, command in group.commands.items():
        for option in command.params:
            names = [each for each in (*option.opts, *option.secondary_opts) if each.startswith("-")]
            shown = [each for each in names if re.search(rf"(?<![\w-]){re.escape(each)}(?![\w-])", text)]
            assert shown or not names, f"{name}: no page tells of {names}"


def test_an_option_that_is_not_there_is_found() -> None:
    with pytest.raises(Exception, match="--frehs"):
        parse(["flux.yaml", "-o", "flux.engine", "--frehs"])


@cache
def run_by_ci() -> frozenset[str]:
    """The targets that .ci/run makes, and what those need."""
    needs = {
        target: needed.split("#")[0].split()
        for target, needed in re.findall(
            r"^([a-z-]+):(?!=)(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
    }
    found = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    for target in found:  # it grows meanwhile
        found += [need for need in needs[target] if need in needs and need not in found]
    return frozenset(found)


@pytest.mark.parametrize("line", MODULES)
def test_a_module_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert line in {shown for _, shown in RUN}
    _, _, module, *arguments = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")
    assert (tmp_path / arguments[0]).stat().st_size > 0


@pytest.mark.parametrize("line", QUICK)
def test_a_command_runs(line: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny model, in the place of the page's."""
    assert line in {shown for _, shown in RUN}
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tiny.yaml").rename(tmp_path / "digits-flux.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_nothing_is_covered_that_is_not_shown() -> None:
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, line) for _, line in RUN), pattern


def test_python_is_python_and_calls_what_is_there() -> None:
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "lynx_compile" or hasattr(lynx_compile, node.attr), block


def test_recipes_are_recipes() -> None:
    found = [yaml.safe_load(block.text) for block in blocks("yaml")]
    assert found
    for values in found:
        Recipe.model_validate(values)


def test_the_recipe_reference_is_of_this_model() -> None:
    assert recipe_reference.PAGE.read_text() == recipe_reference.page(), "run: make docs"
    assert (
        "**`states_per_prompt`** (whole number at least 1 or null; default `4`): Calls kept"
        in recipe_reference.page()
    )


def test_the_readme_is_short_and_its_links_hold() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8 << 10
    for page in PAGES[:2]:
        targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
        assert targets and all((page.parent / target).is_file() for target in targets)


def test_errors_are_quoted_as_they_come() -> None:
    quoted = [line for b in blocks("text") for line in b.text.splitlines() if line.startswith("error: ")]
    assert len(quoted) >= 10
    for line in quoted:
        assert is_an_error(line.removeprefix("error: ")), line
    assert not is_an_error("The recipe flux.yaml is not to be found. Check the path.")


def is_an_error(text: str) -> bool:
    """Whether the sources hold its cause and its remedy together, with anything where they have a value."""
    text = re.sub(r"^Stage '\w+' failed: ", "", text)
    return any(message.fullmatch(text) for message in messages())


@cache
def messages() -> tuple[re.Pattern[str], ...]:
    """A pattern for every cause and remedy that stand side by side in the sources, as arguments or as a pair."""
    found = set()
    for path in (ROOT / "lynx_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            both = (
                node.args[-2:]
                if isinstance(node, ast.Call)
                else node.elts
                if isinstance(node, ast.Tuple)
                else []
            )
            texts = [literal_of(each) for each in both]
            if len(texts) == 2 and sum(len(text.replace(ANY, "")) for text in texts) > 12:
                found.add(" ".join(texts))
    return tuple(map(re.compile, found))


ANY = "(?:.+)"


def literal_of(node: ast.expr) -> str:
    """The pattern of a text in the sources."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(
        re.escape(part.value) if isinstance(part, ast.Constant) and isinstance(part.value, str) else ANY
        for part in parts
    )
