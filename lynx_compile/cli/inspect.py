# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile inspect``: shows what an engine holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lynx_compile.cli.console import out, size, speak, wrong
from lynx_compile.errors import InputError

if TYPE_CHECKING:
    from lynx_compile.engine.manifest import SparseLinears, Stage
    from lynx_compile.tools.inspection import Inspection


def inspect(
    engine: Annotated[
        Path,
        typer.Argument(metavar="ENGINE", help="The engine, with its manifest beside it.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an engine was built from and holds.

    Its layers, plugin, inputs, weights, sizes, and what compiling took.

    \b
    Reads:
      ENGINE, and the manifest, weights and plugin library beside it

    Nothing is written, or run on a GPU. What is damaged or belongs to another engine is an error (exit code 2).

    \b
    Example:
      lynx-compile inspect flux.engine --json
    """
    speak()
    from lynx_compile.tools import inspection

    found = inspection.inspect(engine)
    if as_json:
        print(json.dumps(found.json(), indent=1))
    else:
        _show_inspection(found)
    for problem in found.problems:
        wrong("error", f"{problem} Compile the engine again.")
    if found.problems:
        raise typer.Exit(InputError.exit_code)


def _show_inspection(found: Inspection) -> None:
    m = found.manifest
    library = {
        "same": "installed here",
        "another": "another build is installed here",
        "none": "not installed here",
    }
    weights = f"external, in {m.weights.file}" if m.weights.file else "embedded"
    layers = "" if found.plugin_layers is None else f", {found.plugin_layers} found in the engine"
    facts = {
        "engine": f"{m.engine.file}, {size(m.engine.bytes)}, {m.dtype}, for {', '.join(m.gpus)}",
        "built by": f"lynx-compile {m.compiler} with {m.backend.name} {m.backend.version}",
        "model": f"{m.source.model}, {m.source.subfolder} ({m.source.family})",
        "plugin": f"{m.plugin.library}, {'embedded, ' if m.plugin.embedded else ''}"
        f"{library[found.installed_plugin]}, SHA-256 {m.plugin.sha256[:16]}",
        "plugin layers": f"{m.plugin_layers}{layers}",
        "weights": weights,
        **{f"input {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}" for tensor in m.inputs},
        **{f"output {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}" for tensor in m.outputs},
    }
    for name, value in facts.items():
        out.print(f"{escape(name):<30} {escape(value)}")
    wide = Console(highlight=False, width=max(out.width, 120))
    wide.print(_sparse_table(found))
    dense = Table("reason", "linears", title=f"{len(m.dense)} linears left dense", title_justify="left")
    for reason in dict.fromkeys(linear.reason for linear in m.dense):
        names = [linear.linear for linear in m.dense if linear.reason == reason]
        dense.add_row(escape(reason), escape("\n".join(names)), end_section=True)
    wide.print(dense)
    if m.stages:
        wide.print(_stages_table(m.stages))


def _sparse_table(found: Inspection) -> Table:
    sparse = found.manifest.sparse
    title = f"{sum(len(node.linears) for node in sparse)} linears in {len(sparse)} plugin layers"
    table = Table("layer", "form", title=title, title_justify="left")
    for heading in ("K -> N", "rank", "weights", "worst layer error"):
        table.add_column(heading, justify="right")
    for node in sparse:
        held = found.weight_bytes.get(node.layer)
        table.add_row(
            escape("\n".join(node.linears)), node.form, f"{node.in_channels} -> {node.out_channels}",
            str(node.rank), "-" if held is None else size(held), _worst_error(node),
        )  # fmt: skip
    return table


def _worst_error(node: SparseLinears) -> str:
    """Of its linears: of the solved weights, and of the tuned ones where those are others."""
    worst = f"{max(node.errors):.3f}"
    if not node.solved_errors:
        return worst
    solved = f"{max(node.solved_errors):.3f} solved"
    return solved if node.solved_errors == node.errors else f"{solved}, {worst} tuned"


def _stages_table(stages: Sequence[Stage]) -> Table:
    table = Table("stage", title="compilation", title_justify="left")
    for heading in ("time", "most memory"):
        table.add_column(heading, justify="right")
    for stage in stages:
        peak = "-" if stage.peak_bytes is None else size(stage.peak_bytes)
        table.add_row(stage.name, f"{stage.seconds:.1f} s{' (earlier run)' if stage.reused else ''}", peak)
    return table
