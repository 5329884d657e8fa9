# SPDX-License-Identifier: Apache-2.0
"""What the arguments of ``bench --model`` name: models of known size, and recipes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lynx_compile.engine import trt
from lynx_compile.errors import InputError
from lynx_compile.passes.speed_table import Form
from lynx_compile.recipe import Sparsity
from lynx_compile.tools import recipe_step
from lynx_compile.tools.bench_model import mixture_of, planned
from lynx_compile.tools.full_size import find, step_model
from lynx_compile.tools.step_model import StepModel
from lynx_compile.tools.timing import file_name

Log = Callable[[str], None]


@contextmanager
def models(
    names: Sequence[str], folder: Path, *, random_weights: bool, log: Log
) -> Iterator[list[StepModel]]:
    """They are built when they are measured; while this is open, what recipes were recorded for is there.

    Args:
        folder: of earlier results. What ``bench --fp8`` measured of linears on this GPU decides on the plan of models
            of known size; a recipe has ``costs`` of its own.

    Raises:
        InputError: there is no such model; or a recipe is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="lynx-bench-") as scratch:
        found: list[StepModel] = []
        for number, name in enumerate(names):
            if name.endswith((".yaml", ".yml")):
                room = Path(scratch) / str(number)
                found += recipe_step.step_models(Path(name), room, random_weights=random_weights, log=log)
            else:
                found.append(step_model(find(name), sparsity=_with_costs(folder)))
        yield found


def _with_costs(folder: Path) -> Sparsity:
    if not torch.cuda.is_available():
        return Sparsity()
    costs = folder / f"{file_name(torch.cuda.get_device_name())}-fp8.json"
    return Sparsity(costs=str(costs)) if costs.exists() else Sparsity()


def require_gpu(models: Sequence[StepModel], plan: Mapping[str, Form] | None, log: Log) -> None:
    """Refuse to measure where there is no GPU, after showing what would be: the plan takes no weights.

    Raises:
        InputError: there is none.
    """
    if torch.cuda.is_available():
        return
    for model in models:
        forms = plan or planned(model, model.build("meta"), model.step("cpu"))
        mixture = ", ".join(
            f"{count} linears {words}" for words, count in mixture_of(forms, list(forms)).items()
        )
        log(f"{model.name} ({model.what}), planned for {trt.gpu() or ', '.join(model.gpus)}: {mixture}")
    raise InputError(
        "There is no GPU here to measure a step on.",
        "Run it on a machine with one; what is planned stands above.",
    )
