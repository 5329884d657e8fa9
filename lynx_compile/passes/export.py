# SPDX-License-Identifier: Apache-2.0
"""From the torch module to a dense ONNX file that still knows which node is which linear."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir
import onnxscript.optimizer
import torch

from lynx_compile.errors import StageError
from lynx_compile.files.resume import StageVersion
from lynx_compile.models import DiT

EXPORT = StageVersion("export", 1, ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir"))
OPSET = 18
LINEAR_KEY = "lynx.linear"  # metadata of a node that came from a torch.nn.Linear: its module path
FOLDED_BYTES = (
    4096  # constants larger than this are weights; folding those would copy them and lose their names
)


@dataclass(frozen=True)
class DenseOnnx:
    """An ONNX file with its weights as external data beside it; nodes of linears carry ``LINEAR_KEY``."""

    path: Path
    data: Path | None = None


def export(dit: DiT, path: Path, dtype: torch.dtype | None = None) -> DenseOnnx:
    """Trace the module at its example inputs' (static) shapes; graph inputs keep the names of ``forward``.

    Args:
        dtype: of weights and activations; the recipe's by default. float32 is for comparisons on a CPU.

    Raises:
        StageError: torch cannot trace the module, or the result is not valid ONNX.
    """
    dtype = dtype or dit.dtype
    inputs = {
        name: value.to(dtype) if value.dtype == dit.dtype else value for name, value in dit.inputs.items()
    }
    with _quiet(), _ready(dit.module_on_cpu(dtype), tuple(inputs)) as module:
        try:
            program = torch.onnx.export(
                module, tuple(inputs.values()), input_names=list(inputs), output_names=["velocity"],
                dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            )  # fmt: skip
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise StageError(
                "export", f"torch could not trace the model ({reason}).", "Report the model and this message."
            ) from error
        assert program is not None
        # Folding resolves shapes, and turns the sequence ops that `chunk` leaves into splits.
        onnxscript.optimizer.optimize_ir(
            program.model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES
        )
        _mark_linears(program.model, {linear.path for linear in dit.linears})
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(path, external_data=True)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError("export", f"the exported ONNX is invalid ({error}).", "Report the model.") from None
    data = path.with_name(f"{path.name}.data")
    return DenseOnnx(path, data if data.exists() else None)


@contextmanager
def _ready(module: torch.nn.Module, names: tuple[str, ...]) -> Iterator[torch.nn.Module]:
    """The module with a ``forward`` of plain tensors that returns one tensor.

    diffusers' own ``forward`` takes non-tensor keywords, with which the exporter loses the inputs' names.
    """
    original = module.forward

    def forward(*arguments: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = original(**dict(zip(names, arguments, strict=True)), return_dict=False)[0]
        return result

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    module.forward = forward
    try:
        yield module
    finally:
        del module.forward


def _mark_linears(model: onnx_ir.Model, paths: set[str]) -> None:
    """Put the module path on the matrix product of every linear, and drop all other metadata (it is large)."""
    for node in model.graph:
        scopes = _scopes(node.metadata_props)
        node.metadata_props.clear()
        node.doc_string = None
        if node.op_type in ("MatMul", "Gemm") and len(scopes) > 1 and scopes[-2] in paths:
            node.metadata_props[LINEAR_KEY] = scopes[-2]


def _scopes(metadata: Mapping[str, str]) -> list[str]:
    """Module paths from the root down to the traced operation, as torch writes them."""
    text = metadata.get("pkg.torch.onnx.name_scopes")
    return [str(scope) for scope in json.loads(text.replace("'", '"'))] if text else []


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of missing packages and its own deprecations; none of it concerns the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "diffusers", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
