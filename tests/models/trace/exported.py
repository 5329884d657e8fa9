# SPDX-License-Identifier: Apache-2.0
"""A module's ONNX, run by ONNX Runtime and compared with the module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from lynx_compile.engine.arguments import flatten
from lynx_compile.passes.export import DenseOnnx, export_module


def exported(module: torch.nn.Module, arguments: Mapping[str, Any], folder: Path) -> DenseOnnx:
    return export_module(module.eval(), arguments, folder / "dense.onnx")


def error(dense: DenseOnnx, module: torch.nn.Module, arguments: Mapping[str, Any]) -> float:
    """The relative error of the worst output; infinite where one is not finite."""
    flat = flatten(arguments)
    session = onnxruntime.InferenceSession(dense.path)
    given = {i.name for i in session.get_inputs()}
    results = session.run(None, {k: v.numpy() for k, v in flat.tensors.items() if k in given})
    with torch.no_grad():
        wanted = flatten(module(**arguments), "output").tensors.values()
    worst = 0.0
    for result, reference in zip(results, wanted, strict=True):
        difference = (torch.as_tensor(result).double() - reference.double()).norm()
        worst = max(worst, float(torch.nan_to_num(difference / reference.double().norm(), nan=float("inf"))))
    return worst
