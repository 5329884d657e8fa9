# SPDX-License-Identifier: Apache-2.0
"""A transformer that is ONNX already: what its file holds, its linears, and their weights, which stay on disk."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common

from lynx_compile.errors import InputError, first_line
from lynx_compile.files.digest import file_digest
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.files.tensors import map_tensor
from lynx_compile.models.weight_files import UNQUANTIZED
from lynx_compile.ops.functions import LINEAR_KEY

OLDEST_OPSET = 18  # that the Lynx ops' own functions are written in
INLINE_BYTES = 4096  # larger tensors are external data
QUANTIZED_OP = re.compile(r".*(Quantize|Integer|QLinear|Bnb4|NBits).*")
TORCH_DTYPES = {
    onnx_ir.DataType.FLOAT: torch.float32,
    onnx_ir.DataType.FLOAT16: torch.float16,
    onnx_ir.DataType.BFLOAT16: torch.bfloat16,
    onnx_ir.DataType.DOUBLE: torch.float64,
    onnx_ir.DataType.INT64: torch.int64,
    onnx_ir.DataType.INT32: torch.int32,
    onnx_ir.DataType.BOOL: torch.bool,
}


@dataclass(frozen=True)
class OnnxTensor:
    """An input or output of the graph."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OnnxLinear:
    """A MatMul or Gemm with a constant weight, and the bias that is added to it.

    ``path``: a name like a module's path, from torch's metadata, the weight's name or the node's. ``product``: the
    value that its node makes. ``reads``: the value that it reads, [..., K], of ``shape``, which depends on the graph's
    inputs ``depends``. ``weight``: the initializer, [N, K], or [K, N] where ``by_columns``. ``bias``: the initializer
    [N], or None.
    """

    path: str
    product: str
    reads: str
    shape: tuple[int, ...]
    depends: tuple[str, ...]
    in_channels: int
    out_channels: int
    weight: str
    by_columns: bool
    bias: str | None


@dataclass(frozen=True)
class OnnxCheckpoint:
    """An ONNX file whose linears can be compressed. ``linears``: in the order of the graph."""

    path: Path
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    linears: tuple[OnnxLinear, ...]

    @cached_property
    def model(self) -> onnx_ir.Model:
        """The graph as ``linears`` were found in it, its large tensors still on disk."""
        return _prepared(self.path)

    def save(self, path: Path) -> None:
        """Write ``model``, and its large tensors, one at a time, as external data beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = f"{path.name}.data"
        onnx_ir.save(self.model, path, external_data=data, size_threshold_bytes=INLINE_BYTES)

    def digest(self, progress: Progress = no_progress) -> str:
        """SHA-256 over the file and its external data."""
        files = [self.path, *sorted({Path(t.path) for t in _external(self.model)})]
        digest = hashlib.sha256()
        for done, path in enumerate(files):
            progress(f"reading {path.name}", done, len(files))
            digest.update(file_digest(path).encode())
        progress("read", len(files), len(files))
        return digest.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """``PATH.weight`` [N, K] or ``PATH.bias`` [N] of a linear, mapped from the file where it is external."""
        path, _, kind = name.rpartition(".")
        linear = next(one for one in self.linears if one.path == path)
        values = self.model.graph.initializers
        if kind == "bias":
            assert linear.bias is not None, name
            return _to_torch(values[linear.bias].const_value)
        weight = _to_torch(values[linear.weight].const_value)
        return weight.T if linear.by_columns else weight


def open_onnx(path: Path, dtype: torch.dtype) -> OnnxCheckpoint:
    """Read an ONNX transformer and find its linears; no large tensor is read.

    Args:
        dtype: that its weights must have.

    Raises:
        InputError: it is no valid ONNX, lacks external data, is quantized, has dynamic axes, is of another dtype, or
            holds ops that are not ONNX's own.
    """
    model = _prepared(path)
    _require_plain(path, model)
    inputs = tuple(_tensor(path, value, "input") for value in model.graph.inputs)
    outputs = tuple(_tensor(path, value, "output") for value in model.graph.outputs)
    linears = tuple(_linears(model))
    if not linears:
        raise InputError(
            f"{path} holds no linear (a MatMul or Gemm with a constant weight and a known input shape).",
            "Give the ONNX file of a transformer, exported with its weights and with fixed shapes.",
        )
    for linear in linears:
        found = TORCH_DTYPES.get(model.graph.initializers[linear.weight].const_value.dtype)  # type: ignore[union-attr]
        if found != dtype:
            raise InputError(
                f"{path}: the weight of '{linear.path}' is {str(found)[6:]}, and model.dtype is {str(dtype)[6:]}.",
                f"Export the model in {str(dtype)[6:]} (module.to(torch.{str(dtype)[6:]})), or set model.dtype.",
            )
    return OnnxCheckpoint(path, inputs, outputs, linears)


def _prepared(path: Path) -> onnx_ir.Model:
    """The model with its functions inlined, its constants as initializers and its shapes inferred."""
    if not path.is_file():
        raise InputError(f"The ONNX file {path} does not exist.", "Correct model.onnx in the recipe.")
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf's DecodeError has no common base with OSError
        raise InputError(f"{path} is no ONNX file ({first_line(error)}).", "Export it again.") from None
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise InputError(f"{path} has opset {opset}.", f"Export it with opset {OLDEST_OPSET} or a later one.")
    _require_external_data(path, model)
    try:
        onnx.checker.check_model(path)
        for step in (
            common.InlinePass(),
            common.LiftConstantsToInitializersPass(size_limit=0),
            common.IdentityEliminationPass(),
        ):
            model = step(model).model
        if any(_static(node.inputs[0]) is None for node in _products(model)):
            with _quiet():
                model = common.ShapeInferencePass()(model).model  # leaves the model as it is where it fails
    except Exception as error:  # onnx's checkers and onnx_ir raise many kinds
        raise InputError(f"{path} is not valid ONNX ({first_line(error)}).", "Export it again.") from None
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """onnx_ir logs what the inference of shapes fails at; whether it is needed is seen later."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _products(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    return (node for node in model.graph if node.op_type in ("MatMul", "Gemm") and _weight(node))


def _external(model: onnx_ir.Model) -> Iterator[onnx_ir.ExternalTensor]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            yield value.const_value


def _require_external_data(path: Path, model: onnx_ir.Model) -> None:
    for tensor in _external(model):
        location = Path(tensor.location)
        if location.is_absolute() or ".." in location.parts:
            raise InputError(
                f"{path}: the data of '{tensor.name}' lie outside its folder ({location}).",
                "Save the model with its external data beside it.",
            )
        file = path.parent / location
        if not file.is_file():
            raise InputError(
                f"{file} is missing, which holds the data of {path}.", "Copy it beside the ONNX file."
            )
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > file.stat().st_size:
            raise InputError(
                f"{file} is cut off: '{tensor.name}' ends at byte {end}, and it has {file.stat().st_size}.",
                "Copy or export it again.",
            )


def _require_plain(path: Path, model: onnx_ir.Model) -> None:
    for node in model.graph.all_nodes():
        if QUANTIZED_OP.fullmatch(node.op_type):
            raise InputError(f"{path} is quantized (it holds the op {node.op_type}).", UNQUANTIZED)
        if node.domain not in ("", "ai.onnx"):
            raise InputError(
                f"{path} holds the op {node.op_type} of '{node.domain}', which TensorRT does not know.",
                "Export it to ONNX's own ops, without another runtime's optimizations.",
            )


def _tensor(path: Path, value: onnx_ir.Value, kind: str) -> OnnxTensor:
    shape = _static(value)
    if shape is None:
        raise InputError(
            f"{path}: the {kind} '{value.name}' has no fixed shape ({value.shape}).",
            "Export it with fixed shapes, or fix them with onnxruntime.tools.make_dynamic_shape_fixed.",
        )
    dtype = TORCH_DTYPES.get(value.dtype) if value.dtype is not None else None
    if dtype is None:
        raise InputError(
            f"{path}: the {kind} '{value.name}' is {value.dtype}.", "Export it with other types."
        )
    return OnnxTensor(str(value.name), dtype, shape)


def _static(value: onnx_ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None or not all(isinstance(extent, int) for extent in value.shape):
        return None
    return tuple(int(extent) for extent in value.shape)  # type: ignore[arg-type]


def _linears(model: onnx_ir.Model) -> Iterator[OnnxLinear]:
    taken: dict[str, int] = defaultdict(int)
    depends = _dependencies(model)
    for node in _products(model):
        found = _weight(node)
        assert found is not None
        weight, by_columns = found
        x, size = node.inputs[0], tuple(weight.shape or ())
        shape = _static(x)
        if x is None or shape is None or len(size) != 2 or not weight.is_initializer():
            continue
        in_channels, out_channels = (int(extent) for extent in (size if by_columns else size[::-1]))  # type: ignore[arg-type]
        path = _path(node, weight)
        taken[path] += 1
        yield OnnxLinear(
            path=path if taken[path] == 1 else f"{path}_{taken[path]}",
            product=str(node.outputs[0].name),
            reads=str(x.name),
            shape=shape,
            depends=tuple(sorted(depends[str(x.name)])),
            in_channels=in_channels,
            out_channels=out_channels,
            weight=str(weight.name),
            by_columns=by_columns,
            bias=_bias(node, out_channels),
        )


def _dependencies(model: onnx_ir.Model) -> dict[str, frozenset[str]]:
    """{value: the graph's inputs that it depends on}."""
    found = {str(value.name): frozenset({str(value.name)}) for value in model.graph.inputs}
    for node in model.graph:
        read = [found.get(str(value.name), frozenset()) for value in node.inputs if value is not None]
        found |= dict.fromkeys((str(value.name) for value in node.outputs), frozenset().union(*read))
    return found


def _weight(node: onnx_ir.Node) -> tuple[onnx_ir.Value, bool] | None:
    """The constant [N, K], or [K, N] (True), that a product multiplies with; None where it is no linear."""
    second = node.inputs[1]
    if second is None:
        return None
    attribute = node.attributes.get("transB")  # of a Gemm alone
    columns = attribute is None or not attribute.as_int()
    if second.const_value is not None:
        return second, columns
    maker = second.producer()
    if maker is None or maker.op_type != "Transpose" or maker.inputs[0] is None:
        return None
    return (maker.inputs[0], not columns) if maker.inputs[0].const_value is not None else None


def _bias(node: onnx_ir.Node, channels: int) -> str | None:
    """The initializer that is added: Gemm's third input, or the other operand of the one Add behind a MatMul."""
    if node.op_type == "Gemm":
        third = node.inputs[2] if len(node.inputs) > 2 else None
        return third.name if third is not None and third.const_value is not None else None
    readers = [usage.node for usage in node.outputs[0].uses()]
    if len(readers) != 1 or readers[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    others = [value for value in readers[0].inputs if value is not node.outputs[0]]
    if len(others) == 1 and others[0] is not None and others[0].const_value is not None:
        return others[0].name if tuple(others[0].shape or ()) == (channels,) else None
    return None


def _path(node: onnx_ir.Node, weight: onnx_ir.Value) -> str:
    """What the module was called that the node comes from, as far as the file still knows."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    name = str(node.name or node.outputs[0].name)
    if LINEAR_KEY in node.metadata_props:  # a dense file of ours
        found = node.metadata_props[LINEAR_KEY]
    elif len(scopes) > 1:
        found = scopes[-2]
    elif str(weight.name).endswith(".weight"):
        found = str(weight.name).removesuffix(".weight")
    else:  # torch's older exporter: /blocks.0/attn/to_q/MatMul
        found = name.strip("/").rpartition("/")[0].replace("/", ".") or name
    return re.sub(r"[^\w.-]", "_", found).strip(".")


def _to_torch(tensor: onnx_ir.TensorProtocol | None) -> torch.Tensor:
    assert tensor is not None
    dtype, shape = TORCH_DTYPES[tensor.dtype], tuple(int(extent) for extent in tensor.shape)  # type: ignore[arg-type]
    if isinstance(tensor, onnx_ir.ExternalTensor):
        return map_tensor(Path(tensor.path), tensor.offset or 0, dtype, shape)
    return torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype).reshape(shape)
