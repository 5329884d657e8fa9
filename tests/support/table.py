# SPDX-License-Identifier: Apache-2.0
"""The results as docs/support.json and docs/support.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEYS = (
    "class pipeline captured exported equal masks_live candidates rewritten engine dropin reason".split()  # noqa: SIM905
)
HEAD = """\
# Which transformers of diffusers compile

Written by `make support`, with diffusers {diffusers} and torch {torch}: every transformer class on tiny models of
random weights, on a CPU.

- **captured**: a pipeline of diffusers ran, and its calls of the transformer were recorded.
- **exported**, **equal**: to ONNX in float32; ONNX Runtime's results equal torch's to 1e-4, on other inputs too.
- **masks**: still equal with another mask than the example's. `fixed`: an engine holds for the lengths of the example.
- **rewritten**: of the linears that may be sparse, how many became nodes of ours in a graph that equals the dense one.
- **engine**: TensorRT for RTX built one, with a plugin layer for every such node.
- **drop-in**: the pipeline's own output, with engines on a fake GPU in the place of its transformers; where no
  pipeline can be run here, the model's own results, as said below.

`-`: not run, or there is nothing to run.

{totals}

| class | pipelines | captured | exported | equal | masks | rewritten | engine | drop-in |
|---|---|---|---|---|---|---|---|---|
"""


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Both files, from rows as ``check`` gives them."""
    folder.mkdir(exist_ok=True)
    entries = [_entry(row) for row in rows]
    (folder / "support.json").write_text(json.dumps(entries, indent=1) + "\n")
    (folder / "support.md").write_text(_page(entries, rows))


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    entry = {key: row.get(key) for key in KEYS}
    reasons = "; ".join(row.get("reason") or [])
    return entry | {
        "class": row["class_name"],
        "pipeline": row.get("pipeline") or None,
        "reason": reasons or None,
    }


def _page(entries: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    totals = ", ".join(
        f"{key} {sum(entry[key] is True for entry in entries)}"
        for key in ("captured", "exported", "equal", "engine", "dropin")
    )
    head = HEAD.format(
        diffusers=version("diffusers"), torch=version("torch"), totals=f"Of {len(entries)} classes: {totals}."
    )
    lines = ["| " + " | ".join(_cells(entry)) + " |" for entry in entries]
    reasons = [f"- **{entry['class']}**: {entry['reason']}" for entry in entries if entry["reason"]]
    fixed = [f"- **{row['class_name']}**: {' '.join(row['fixed'])}" for row in rows if row.get("fixed")]
    parts = [head + "\n".join(lines)]
    if reasons:
        parts.append("## What did not go, and why\n\n" + "\n".join(reasons))
    if fixed:
        parts.append("## What tracing fixes\n\n" + "\n".join(fixed))
    return "\n\n".join(parts) + "\n"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    def mark(key: str, yes: str = "yes", no: str = "no") -> str:
        return {True: yes, False: no, None: "-"}[entry[key]]

    counts = "-" if entry["candidates"] is None else f"{entry['rewritten']} of {entry['candidates']}"
    return [
        entry["class"],
        ", ".join(entry["pipeline"] or ["-"]),
        mark("captured"),
        mark("exported"),
        mark("equal"),
        mark("masks_live", "live", "fixed"),
        counts,
        mark("engine"),
        mark("dropin"),
    ]
