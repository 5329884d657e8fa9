# SPDX-License-Identifier: Apache-2.0
"""From the torch module to a dense ONNX file that still knows which node is which linear."""

from __future__ import annotations

import ast
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.external_data import convert_tensors_to_external
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import _no_op
from torch.export import Dim

from lynx_compile.engine.arguments import Arguments, Structure, flatten, unflatten
from lynx_compile.engine.manifest import Length
from lynx_compile.errors import LynxError, StageError, first_line
from lynx_compile.files.atomic import save_bytes
from lynx_compile.files.onnx_check import check_onnx
from lynx_compile.files.resume import StageVersion
from lynx_compile.models.checkpoint import Checkpoint
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Axis
from lynx_compile.models.structure import is_linear
from lynx_compile.models.trace import Baked, exportable
from lynx_compile.models.weight_files import StoredTensor
from lynx_compile.ops.functions import LINEAR_KEY, OPSET

EXPORT = StageVersion("export", 7, ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir"))
FOLDED_BYTES = (
    4096  # constants larger than this are weights; folding those would copy them and lose their names
)

INLINE_BYTES = 256  # larger tensors are external data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseOnnx:
    """An ONNX file with its weights as external data beside it; nodes of linears carry ``LINEAR_KEY``.

    ``output``: what ``forward`` returns, with the graph's outputs as its tensors.
    ``baked``: values of the example's arguments that the graph holds as constants.
    ``lengths``: of the inputs' axes that have no fixed one.
    """

    path: Path
    data: Path | None = None
    output: Structure | None = None
    baked: tuple[Baked, ...] = ()
    lengths: tuple[Length, ...] = ()


def export(dit: DiT, path: Path, dtype: torch.dtype | None = None, *, referring: bool = False) -> DenseOnnx:
    """Trace the module at its example inputs' shapes; graph inputs keep the names of ``forward``.

    Lengths that no mask lets pad stay open. Where the model cannot be traced so, the graph is for those of the example
    alone, and the user is told.

    Args:
        dtype: of weights and activations; the recipe's by default. float32 is for comparisons on a CPU.
        referring: leave the weights in the checkpoint's files where they have ``dtype`` there, and let the graph refer
            to them: nothing is copied. ONNX Runtime refuses such a file, ``rewrite`` reads it.

    Raises:
        StageError: torch cannot trace the module, or the result is not valid ONNX.
    """
    dtype = dtype or dit.dtype
    stored = _in_dtype(dit, dtype) if referring else {}
    dense = export_lengths(dit.module_on_cpu(dtype), dit.arguments, dit.axes, path, dtype, stored)
    for baked in dense.baked:
        log.warning("%s", baked)
    return dense


def referred(dit: DiT) -> tuple[Path, ...]:
    """The files that an export in the model's dtype refers to: none where the weights are stored in another."""
    return tuple(sorted({tensor.file for tensor in _in_dtype(dit, dit.dtype).values()}))


def _in_dtype(dit: DiT, dtype: torch.dtype) -> dict[str, StoredTensor]:
    tensors = dit.checkpoint.tensors if isinstance(dit.checkpoint, Checkpoint) else {}
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}


def export_lengths(
    module: torch.nn.Module,
    arguments: Mapping[str, Any],
    axes: Sequence[Axis],
    path: Path,
    dtype: torch.dtype | None = None,
    stored: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> DenseOnnx:
    """As ``export_module``; where it cannot leave ``axes`` open, at the example's lengths, with a warning."""
    try:
        return export_module(module, arguments, path, dtype, axes, stored)
    except StageError as error:
        if not axes:
            raise
        sizes = flatten(arguments).tensors
        log.warning(
            "The engine is for one length alone: %s. %s",
            ", ".join(
                f"'{axis.tensor}' has {sizes[axis.tensor].shape[axis.axis]} entries along axis {axis.axis}, and "
                f"between {axis.smallest} and {axis.largest} in the recorded calls"
                for axis in axes
            ),
            error,
        )
        return export_module(module, arguments, path, dtype, stored=stored)


def export_module(
    module: torch.nn.Module,
    arguments: Mapping[str, Any],
    path: Path,
    dtype: torch.dtype | None = None,
    axes: Sequence[Axis] = (),
    stored: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> DenseOnnx:
    """Trace any module at the shapes of one call of it.

    Args:
        module: on the CPU, in the dtype that the graph is to have.
        arguments: of ``forward``, by name, nested as the caller gives them. Tensors become graph inputs, named by
            their path (``x.0``); everything else is constant.
        dtype: of the inputs in half precision; what they have by default. float64 becomes float32, always,
            and complex numbers pairs of real ones.
        axes: of the tensors, those whose lengths stay open.
        stored: tensors of ``module`` that lie in files already, and are referred to there.

    Raises:
        InputError: an argument is neither a tensor nor a plain constant.
        StageError: torch cannot trace the module, or not for all lengths, or the result is not valid ONNX.
    """
    flat = flatten(arguments)
    example = {name: _ready_input(tensor, dtype) for name, tensor in flat.tensors.items()}
    are_complex = {name: tensor.is_complex() for name, tensor in flat.tensors.items()}
    results: list[Arguments] = []
    with _quiet(), torch.no_grad(), _tensors_only(module, flat.structure, are_complex, results):
        with exportable(module, example) as baked:
            program = _traced(module, tuple(example.values()), _open_shapes(list(example), axes))
            _check_open(axes, baked)
        outputs = list(results[-1].tensors)
        onnx_program = _translated(program, tuple(example.values()), list(example), outputs)
        _fold(onnx_program.model)
        _index_in_int64(onnx_program.model)
        linears = {path for path, submodule in module.named_modules() if is_linear(submodule)}
        _mark_linears(onnx_program.model, linears)
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(onnx_program.model, path, _unchanged(module, stored))
    if problem := check_onnx(path):
        raise StageError("export", f"the exported ONNX is invalid ({problem}).", "Report the model.")
    data = path.with_name(f"{path.name}.data")
    return DenseOnnx(
        path, data if data.exists() else None, results[-1].structure, tuple(baked), _lengths(axes)
    )


def _ready_input(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """On the CPU, in memory of its own; half precision as ``dtype``.

    No engine takes float64, which becomes float32, nor complex numbers: those are pairs, in a last dimension of 2.
    """
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    halves = (torch.bfloat16, torch.float16)
    wanted = torch.float32 if tensor.dtype == torch.float64 else dtype if tensor.dtype in halves else None
    return tensor.detach().to("cpu", wanted).contiguous().clone()


@contextmanager
def _tensors_only(
    module: torch.nn.Module, structure: Structure, are_complex: Mapping[str, bool], results: list[Arguments]
) -> Iterator[None]:
    """While this is open, ``forward`` takes real tensors only and returns a tuple of tensors; ``results`` has the rest.

    diffusers' own takes other arguments too, with which the exporter loses the inputs' names. The module is not
    wrapped in another, so that the module paths stay.
    """
    original = module.forward

    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {
            name: torch.view_as_complex(tensor) if is_complex else tensor
            for (name, is_complex), tensor in zip(are_complex.items(), tensors, strict=True)
        }
        result = original(**unflatten(structure, given))
        results.append(flatten(result, "output"))
        return tuple(results[-1].tensors.values())

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(f"input_{i}", kind) for i in range(len(are_complex))]
    )
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _open_shapes(names: Sequence[str], axes: Sequence[Axis]) -> tuple[dict[int, Any] | None, ...] | None:
    """Per input, its open axes as the exporter takes them."""
    if not axes:
        return None
    roots = {
        axis.symbol: Dim(axis.symbol, min=axis.smallest - axis.offset, max=axis.largest - axis.offset)
        for axis in axes
    }
    return tuple(
        {
            a.axis: roots[a.symbol] + a.offset if a.offset else roots[a.symbol]
            for a in axes
            if a.tensor == name
        }
        or None
        for name in names
    )


def _check_open(axes: Sequence[Axis], baked: Sequence[Baked]) -> None:
    """A value of a tensor that is fixed to the example's fixes its length."""
    for axis in axes:
        for one in baked:
            if axis.tensor in one.arguments:
                raise StageError(
                    "export",
                    f"{one.where} decides on '{axis.tensor}', whose length varies.",
                    "Report the model.",
                )


def _lengths(axes: Sequence[Axis]) -> tuple[Length, ...]:
    return tuple(
        Length(tensor=axis.tensor, axis=axis.axis, smallest=axis.smallest, largest=axis.largest)
        for axis in axes
    )


def _traced(
    module: torch.nn.Module,
    tensors: tuple[torch.Tensor, ...],
    open_shapes: tuple[dict[int, Any] | None, ...] | None,
) -> torch.export.ExportedProgram:
    """Never by ``torch.onnx.export`` itself: it falls back to strict tracing, which renames every scope."""
    try:
        return torch.export.export(
            module,
            tensors,
            dynamic_shapes=open_shapes,
            strict=False,
            # Of decisions on lengths, those that hold for some of them alone are seen and refused.
            prefer_deferred_runtime_asserts_over_guards=False,
        )
    except LynxError:
        raise
    except Exception as error:
        raise StageError(
            "export",
            f"torch could not trace the model ({first_line(error)}).",
            "Report the model and this message.",
        ) from error


def _translated(
    program: torch.export.ExportedProgram,
    tensors: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
) -> torch.onnx.ONNXProgram:
    try:
        translated = torch.onnx.export(
            program, tensors, input_names=inputs, output_names=outputs,
            dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
        )  # fmt: skip
    except Exception as error:
        raise StageError(
            "export",
            f"ONNX has no form of the model ({first_line(error.__cause__ or error)}).",
            "Report the model and this message.",
        ) from error
    assert translated is not None
    return translated


def _fold(model: onnx_ir.Model) -> None:
    """Resolve shapes, and turn the sequence ops that ``chunk`` leaves into splits.

    Transposes of weights stay, though onnxscript folds those whatever their size: they would be copies, without names,
    of what the file refers to (17 of FLUX.1-dev's 24 GB). TensorRT and ONNX Runtime fold them for themselves.

    onnxscript's rules for x + 0 and x * 1 are left out: they take 1e-15 for 0, and a division by 0 + 1e-15 for one
    by 0.
    """
    rules = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in list(_no_op.rules))
    with patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules):
        onnxscript.optimizer.optimize_ir(
            model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES,
            should_fold=lambda node: False if _transposes_a_weight(node) else None,
        )  # fmt: skip


def _transposes_a_weight(node: onnx_ir.Node) -> bool:
    if node.op_type != "Transpose" or node.inputs[0] is None:
        return False
    value = node.inputs[0].const_value
    return value is not None and value.nbytes > FOLDED_BYTES


def _index_in_int64(model: onnx_ir.Model) -> None:
    """GatherND takes no other indices, and torch's exporter hands it int32 as it is (Z-Image's rotary tables)."""
    for node in tuple(model.graph):
        indices = node.inputs[1] if node.op_type == "GatherND" else None
        if indices is not None and indices.dtype == onnx_ir.DataType.INT32:
            wide = onnx_ir.node("Cast", [indices], {"to": onnx_ir.DataType.INT64})
            wide.outputs[0].dtype, wide.outputs[0].shape = onnx_ir.DataType.INT64, indices.shape
            model.graph.insert_before(node, wide)
            node.replace_input_with(1, wide.outputs[0])


def _mark_linears(model: onnx_ir.Model, paths: set[str]) -> None:
    """Put the module path on the matrix product of every linear, and drop all other metadata (it is large)."""
    for node in model.graph:
        scopes = _scopes(node.metadata_props)
        node.metadata_props.clear()
        node.doc_string = None
        if node.op_type in ("MatMul", "Gemm", "Conv") and len(scopes) > 1 and scopes[-2] in paths:
            node.metadata_props[LINEAR_KEY] = scopes[-2]


def _scopes(metadata: Mapping[str, str]) -> list[str]:
    """Module paths from the root down to the traced operation, as torch writes them."""
    text = metadata.get("pkg.torch.onnx.name_scopes")
    return [str(scope) for scope in ast.literal_eval(text)] if text else []


def _unchanged(
    module: torch.nn.Module, stored: Mapping[str, StoredTensor]
) -> dict[str, tuple[torch.Tensor, StoredTensor]]:
    """Those of the module's tensors that are mapped from their files as they are."""
    own = module.state_dict(keep_vars=True)
    return {
        name: (own[name], place)
        for name, place in stored.items()
        if name in own and own[name].dtype == place.dtype and own[name].device.type == "cpu"
    }


def _save(
    model: onnx_ir.Model, path: Path, unchanged: Mapping[str, tuple[torch.Tensor, StoredTensor]]
) -> None:
    """Write the file. Weights that are ``unchanged`` are referred to where they lie, all others go to a file beside."""
    others = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        own, place = unchanged.get(name, (None, None))
        raw = tensor.raw
        if own is not None and isinstance(raw, torch.Tensor) and raw.data_ptr() == own.data_ptr():
            assert place is not None and tuple(raw.shape) == place.shape, name
            value.const_value = onnx_ir.ExternalTensor(
                place.file.resolve(), place.offset, place.bytes, tensor.dtype,
                shape=onnx_ir.Shape(place.shape), name=name, base_dir=path.parent,
            )  # fmt: skip
        elif tensor.nbytes > INLINE_BYTES:
            others.append((value, tensor))
    written = (
        convert_tensors_to_external([tensor for _, tensor in others], path.parent, f"{path.name}.data")
        if others
        else []
    )
    for (value, _), tensor in zip(others, written, strict=True):
        value.const_value = tensor
    save_bytes(path, onnx_ir.to_proto(model).SerializeToString())


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
