# SPDX-License-Identifier: Apache-2.0
"""What FP8 kernels make of a compiled emoji model beside their definition: its output, and linear by linear.

``python -m calib.emoji_flux.kernels build/emoji-945m out/b945.engine [--plugin FILE]``, with an engine compiled for
torch. On calls of the dense model's own run, at five of its steps: the output's error against the dense model's, with
the definition of every FP8 linear (exact sums) and with its kernel; then each linear's kernel against its definition
on what it reads in the model of definitions, and by how much it returns too little on average. Both round to the
model's dtype. Without a GPU the kernels are the definitions.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from calib.emoji_flux import prompts, sampler
from calib.emoji_flux.sums import relative_error, shortfall
from lynx_compile.engine.manifest import Manifest
from lynx_compile.files.outputs import Outputs
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.torch_ops.apply import apply
from lynx_compile.torch_ops.definitions import definition
from lynx_compile.torch_ops.modules import Fp8Linear
from lynx_compile.torch_ops.operators import use_library

STEPS = (1, 6, 11, 16, 19)  # of the pipeline's 20
Rows = Callable[[Fp8Linear, torch.Tensor], torch.Tensor]
Call = Mapping[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of calib.emoji_flux.train")
    parser.add_argument("engine", type=Path)
    parser.add_argument("--plugin", type=Path, help="another build of liblynx_plugin.so")
    parser.add_argument("--images", type=int, default=16)
    given = parser.parse_args()
    if given.plugin:
        use_library(given.plugin)
    outputs, linears = compared(given.model, given.engine, given.images)
    for name, errors in outputs.items():
        print(f"{name:12s} output error", *(f"{error:.4f}" for error in errors), flush=True)
    for name, found in linears.items():
        print(f"{name:50s}", *(f"{error:.4f} (-{less:.4f})" for error, less in found), flush=True)


def compared(
    folder: Path, engine: Path, images: int
) -> tuple[dict[str, list[float]], dict[str, list[tuple[float, float]]]]:
    """Output errors at ``STEPS`` by definitions and by kernels; there of each linear's kernel error and shortfall."""
    dtype = DTYPES[Manifest.read(Outputs.find(engine).manifest).dtype]
    model, rows = sampler.opened(folder, prompts.read(prompts.HELD_OUT)[:images])
    model = model.to(dtype)
    calls = _calls(model, rows, dtype)
    dense = _outputs(model, calls)
    apply(model, engine)
    places = {module: name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    linears: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def compare(linear: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
        y, found = definition(linear, x, torch.float32).to(x.dtype), by_kernel(linear, x)
        linears[f"{places[linear]}, K {linear.in_features}"].append(
            (relative_error(found, y), shortfall(found, y))
        )
        return y

    by_kernel: Rows = Fp8Linear.rows
    with _rows(compare):
        exact = _outputs(model, calls)
    return {
        name: [relative_error(y, wanted) for y, wanted in zip(found, dense, strict=True)]
        for name, found in (("definitions", exact), ("kernels", _outputs(model, calls)))
    }, dict(linears)


def _calls(model: Any, rows: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[Call]:
    """What the dense model is called with at ``STEPS``."""
    found: list[Call] = []

    def velocity(**inputs: torch.Tensor) -> torch.Tensor:
        kept = ("img_ids", "txt_ids", "timestep")
        found.append({name: t if name in kept else t.to(dtype) for name, t in inputs.items()})
        y: torch.Tensor = model(**found[-1], return_dict=False)[0]
        return y.float()

    count = len(rows["encoder_hidden_states"])
    sampler.sample(velocity, rows, seed=0, guidance=1, batch=count)
    return [found[step] for step in STEPS]


@torch.no_grad()
def _outputs(model: Any, calls: Sequence[Call]) -> list[torch.Tensor]:
    return [model(**call, return_dict=False)[0] for call in calls]


@contextmanager
def _rows(instead: Rows) -> Iterator[None]:
    """FP8 linears compute by ``instead`` meanwhile."""
    before = Fp8Linear.rows
    Fp8Linear.rows = instead  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fp8Linear.rows = before  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
