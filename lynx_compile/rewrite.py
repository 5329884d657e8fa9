# SPDX-License-Identifier: Apache-2.0
"""Replace the chosen linears of a dense ONNX graph by ``LynxSparseLinear`` nodes.

Before::

    x ── MatMul(·, Transpose(Wq)) ── Add(bq) ── q        also Gemm(x, W, b) and MatMul without Add
    x ── MatMul(·, Transpose(Wk)) ── Add(bk) ── k

After::

    x ── LynxSparseLinear(weight, lora_down, bias, order, centre, saliency) ── Split ── q, k

Requires the node metadata that ``export`` leaves. Ensures that every linear of the plan is either rewritten or
listed with the reason why not, that the file passes ONNX's full check, and that it runs in ONNX Runtime: it
carries the op's meaning as a model-local function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from lynx_compile.compensate import SparseLinearWeights, load_weights
from lynx_compile.errors import StageError
from lynx_compile.export import LINEAR_KEY, OPSET, DenseOnnx
from lynx_compile.files import atomic_path
from lynx_compile.models import Linear
from lynx_compile.select import SparsityPlan
from lynx_compile.tensors import TensorSpec, write_tensors

DOMAIN = "lynx"
OP = "LynxSparseLinear"
OP_VERSION = "1"


@dataclass(frozen=True)
class DenseLinear:
    """A linear that stays dense, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class SparseNode:
    """One ``LynxSparseLinear`` node and the linears it replaces."""

    name: str
    linears: tuple[str, ...]
    in_channels: int
    out_channels: int
    rank: int
    norm_scale: bool
    error: float


@dataclass(frozen=True)
class LynxOnnx:
    """The rewritten file. All large tensors are in ``weights_path``, a safetensors file beside it.

    ``external_inputs``: names of graph inputs, also keys of ``weights_path``, that a runtime binds; () when the
    weights are constants of the graph.
    """

    path: Path
    weights_path: Path
    external_inputs: tuple[str, ...]
    sparse: tuple[SparseNode, ...]
    dense: tuple[DenseLinear, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.sparse)


def rewrite(
    dense: DenseOnnx, plan: SparsityPlan, weights: Sequence[Path], path: Path, *, external: bool = False
) -> LynxOnnx:
    """Write ``path`` (.onnx) and ``path`` with suffix .safetensors from a dense file and compensated weights.

    Args:
        weights: what ``compensate`` wrote, one file per group.
        external: make the sparse linears' weights graph inputs instead of constants.

    Raises:
        StageError: the dense file is unreadable, or the result is not valid ONNX.
    """
    try:
        model = onnx.load(dense.path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no common base with OSError
        raise StageError(
            "rewrite", f"{dense.path} cannot be read ({error}).", "Run again with --fresh."
        ) from None
    graph, linear_of = _import(model)
    dtype = _torch_dtype(model)
    decisions = {decision.linear.path: decision for decision in plan.decisions}
    refused = {path: decision.reason for path, decision in decisions.items() if decision.operand == "none"}
    nodes: list[SparseNode] = []
    tensors: list[TensorSpec] = []
    identities: dict[int, list[TensorSpec]] = {}
    for file in weights:
        solved = load_weights(file)
        linears = [decisions[linear].linear for linear in solved.linears]
        matches, reasons = _match(graph, linear_of, linears)
        refused |= reasons
        identity = identities.setdefault(solved.in_channels, _identity(solved.in_channels, dtype))
        for readers in _readers_of_one_tensor(matches):
            node = _describe(readers, solved)
            specs = _tensors(node, solved, file, dtype)
            _replace(graph, node, [matches[linear] for linear in readers], solved, [*specs, *identity])
            nodes.append(node)
            tensors += specs
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    external_inputs = tuple(tensor.name for tensor in tensors) if external else ()
    constants = [tensor for tensors_ in identities.values() for tensor in tensors_]
    _save(gs.export_onnx(graph), dense.path.parent, [*tensors, *constants], external_inputs, path)
    left = tuple(DenseLinear(linear, reason) for linear, reason in refused.items())
    return LynxOnnx(path, path.with_suffix(".safetensors"), external_inputs, tuple(nodes), left)


def lynx_function(opset: int = OPSET) -> onnx.FunctionProto:
    """The op's meaning in plain ONNX ops (``sparsity`` has it in words); float32 inside, x's dtype outside."""
    function = onnx.parser.parse_function(FUNCTION.replace("OPSET", str(opset)))
    function.doc_string = "2:4 activation sparsity with compensation; see lynx_compile/sparsity.py."
    return function


FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET]>
LynxSparseLinear <rank, norm_scale, has_order, has_centre, has_saliency, plugin_namespace, plugin_version>
    (x, weight, lora_down, bias, order, centre, saliency) => (y)
{
    shape = Shape (x)
    channels = Shape <start = -1> (x)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    minus_one = Constant <value_ints = [-1]> ()
    rank_scalar = Constant <value_int: int = @rank> ()
    r = Reshape (rank_scalar, one)

    ordered = Gather <axis = -1> (x, order)
    ordered32 = Cast <to = 1> (ordered)
    centre32 = Cast <to = 1> (centre)
    centred = Sub (ordered32, centre32)
    z = CastLike (centred, x)
    z32 = Cast <to = 1> (z)

    saliency32 = Cast <to = 1> (saliency)
    weighed = Mul (z32, saliency32)
    score = Abs (weighed)
    groups_of_4 = Constant <value_ints = [-1, 4]> ()
    grouped = Reshape (score, groups_of_4)
    a, b, c, d = Split <axis = -1, num_outputs = 4> (grouped)
    a_nan = IsNaN (a)
    b_nan = IsNaN (b)
    c_nan = IsNaN (c)
    a_ge_b = GreaterOrEqual (a, b)
    a_ge_c = GreaterOrEqual (a, c)
    a_ge_d = GreaterOrEqual (a, d)
    b_ge_c = GreaterOrEqual (b, c)
    b_ge_d = GreaterOrEqual (b, d)
    c_ge_d = GreaterOrEqual (c, d)
    ab = Or (a_ge_b, a_nan)
    ac = Or (a_ge_c, a_nan)
    ad = Or (a_ge_d, a_nan)
    bc = Or (b_ge_c, b_nan)
    bd = Or (b_ge_d, b_nan)
    cd = Or (c_ge_d, c_nan)
    ba = Not (ab)
    ca = Not (ac)
    da = Not (ad)
    cb = Not (bc)
    db = Not (bd)
    dc = Not (cd)
    a_wins = Concat <axis = -1> (ab, ac, ad)
    b_wins = Concat <axis = -1> (ba, bc, bd)
    c_wins = Concat <axis = -1> (ca, cb, cd)
    d_wins = Concat <axis = -1> (da, db, dc)
    a_count = Cast <to = 1> (a_wins)
    b_count = Cast <to = 1> (b_wins)
    c_count = Cast <to = 1> (c_wins)
    d_count = Cast <to = 1> (d_wins)
    a_sum = ReduceSum <keepdims = 1> (a_count, minus_one)
    b_sum = ReduceSum <keepdims = 1> (b_count, minus_one)
    c_sum = ReduceSum <keepdims = 1> (c_count, minus_one)
    d_sum = ReduceSum <keepdims = 1> (d_count, minus_one)
    wins = Concat <axis = -1> (a_sum, b_sum, c_sum, d_sum)
    enough = Constant <value_float = 1.5> ()
    keep_grouped = Greater (wins, enough)
    keep = Reshape (keep_grouped, shape)
    none = Constant <value_float = 0.0> ()
    kept = Where (keep, z32, none)

    squares = Mul (z32, z32)
    kept_squares = Mul (kept, kept)
    norm = ReduceSum <keepdims = 1> (squares, minus_one)
    kept_norm = ReduceSum <keepdims = 1> (kept_squares, minus_one)
    epsilon = Constant <value_float = 1e-8> ()
    kept_norm_safe = Add (kept_norm, epsilon)
    ratio = Div (norm, kept_norm_safe)
    root = Sqrt (ratio)
    unit = Constant <value_float = 1.0> ()
    flag_int = Constant <value_int: int = @norm_scale> ()
    flag = Cast <to = 9> (flag_int)
    scale = Where (flag, root, unit)

    down = Slice (lora_down, zero, r, zero)
    down32 = Cast <to = 1> (down)
    down32_t = Transpose <perm = [1, 0]> (down32)
    low = MatMul (z32, down32_t)
    low_scaled = Div (low, scale)
    alive = Greater (scale, none)
    low_safe = Where (alive, low_scaled, none)
    low_rounded = CastLike (low_safe, x)
    low32 = Cast <to = 1> (low_rounded)
    leading = Slice (shape, zero, minus_one, zero)
    pairs = Div (r, two)
    pairs_shape = Concat <axis = 0> (leading, pairs, two)
    low_pairs = Reshape <allowzero = 1> (low32, pairs_shape)
    no_pairs = ConstantOfShape (pairs_shape)
    low_groups = Concat <axis = -1> (low_pairs, no_pairs)
    width = Mul (r, two)
    low_shape = Concat <axis = 0> (leading, width)
    low_spread = Reshape <allowzero = 1> (low_groups, low_shape)

    operand = Concat <axis = -1> (kept, low_spread)
    used = Add (channels, width)
    weight_used = Slice (weight, zero, used, one)
    weight32 = Cast <to = 1> (weight_used)
    weight32_t = Transpose <perm = [1, 0]> (weight32)
    product = MatMul (operand, weight32_t)
    scaled = Mul (product, scale)
    bias32 = Cast <to = 1> (bias)
    y32 = Add (scaled, bias32)
    y = CastLike (y32, x)
}
"""


@dataclass(frozen=True)
class _Match:
    """A linear in the graph: what it reads, what it makes, and the nodes in between (product, then bias)."""

    x: gs.Variable
    y: gs.Variable
    nodes: tuple[gs.Node, ...]


def _import(model: onnx.ModelProto) -> tuple[gs.Graph, dict[str, str]]:
    """The graph, and {node name: module path}: graphsurgeon does not carry metadata."""
    linear_of = {
        node.name: entry.value
        for node in model.graph.node
        for entry in node.metadata_props
        if entry.key == LINEAR_KEY
    }
    return gs.import_onnx(model), linear_of


def _match(
    graph: gs.Graph, linear_of: dict[str, str], linears: Sequence[Linear]
) -> tuple[dict[str, _Match], dict[str, str]]:
    """Find each linear's nodes; those not found come with a reason."""
    products: dict[str, list[gs.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.name in linear_of:
            products[linear_of[node.name]].append(node)
    matches: dict[str, _Match] = {}
    reasons: dict[str, str] = {}
    for linear in linears:
        found = products[linear.path]
        if len(found) != 1:
            reasons[linear.path] = f"the graph holds {len(found)} matrix products of it, not one"
        elif isinstance(match := _match_one(found[0], linear, graph), str):
            reasons[linear.path] = match
        else:
            matches[linear.path] = match
    return matches, reasons


def _match_one(product: gs.Node, linear: Linear, graph: gs.Graph) -> _Match | str:
    """The pattern at one MatMul or Gemm, or the reason why it does not fit."""
    x, weight, *bias = product.inputs
    y = product.outputs[0]
    if not _is_weight(weight):
        return "its weight is no constant of the graph"
    if product.op == "Gemm":
        attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0} | product.attrs
        if (attributes["alpha"], attributes["beta"], attributes["transA"]) != (1.0, 1.0, 0):
            return "its Gemm scales or transposes an operand"
        return _Match(x, y, (product,)) if bool(bias) == linear.bias else "its bias is not in its Gemm"
    if not linear.bias:
        return _Match(x, y, (product,))
    if len(y.outputs) != 1 or y in graph.outputs or y.outputs[0].op != "Add":
        return "its bias is not added right behind its MatMul"
    add = y.outputs[0]
    other = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
    if not isinstance(other, gs.Constant) or tuple(other.shape) != (linear.out_channels,):
        return "what is added behind its MatMul is not its bias"
    return _Match(x, add.outputs[0], (product, add))


def _is_weight(tensor: gs.Tensor) -> bool:
    """A constant, or the Transpose of one."""
    if isinstance(tensor, gs.Constant):
        return True
    return (
        len(tensor.inputs) == 1
        and tensor.inputs[0].op == "Transpose"
        and isinstance(tensor.inputs[0].inputs[0], gs.Constant)
    )


def _readers_of_one_tensor(matches: dict[str, _Match]) -> list[tuple[str, ...]]:
    """The linears, split by the tensor that they read in the graph (as a rule all of a group read one)."""
    readers: dict[str, list[str]] = defaultdict(list)
    for linear, match in matches.items():
        readers[match.x.name].append(linear)
    return [tuple(linears) for linears in readers.values()]


def _describe(linears: tuple[str, ...], solved: SparseLinearWeights) -> SparseNode:
    channels = dict(zip(solved.linears, solved.out_channels, strict=True))
    return SparseNode(
        name=f"{linears[0]}.{OP}",
        linears=linears,
        in_channels=solved.in_channels,
        out_channels=sum(channels[linear] for linear in linears),
        rank=solved.rank,
        norm_scale=solved.norm_scale,
        error=solved.error,
    )


def _tensors(
    node: SparseNode, solved: SparseLinearWeights, file: Path, dtype: torch.dtype
) -> list[TensorSpec]:
    """Weight, lora_down and bias of a node; read from ``file`` only when they are written."""
    ends = np.cumsum(solved.out_channels).tolist()
    rows_of = {
        linear: range(end - size, end)
        for linear, size, end in zip(solved.linears, solved.out_channels, ends, strict=True)
    }
    rows = [row for linear in node.linears for row in rows_of[linear]]

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            tensor: torch.Tensor = getattr(load_weights(file), name)
            return (tensor if name == "lora_down" else tensor[rows]).to(dtype)

        return read

    shapes = {
        "weight": (node.out_channels, solved.weight.shape[1]),
        "lora_down": tuple(solved.lora_down.shape),
        "bias": (node.out_channels,),
    }
    return [TensorSpec(f"{node.name}.{name}", dtype, shape, reader(name)) for name, shape in shapes.items()]


def _identity(channels: int, dtype: torch.dtype) -> list[TensorSpec]:
    """Order, centre and saliency that change nothing, shared by all nodes with so many channels."""
    values = {
        "order": torch.arange(channels, dtype=torch.int32),
        "centre": torch.zeros(channels, dtype=dtype),
        "saliency": torch.ones(channels, dtype=dtype),
    }
    return [
        TensorSpec(f"lynx.{name}.{channels}", value.dtype, (channels,), partial(torch.clone, value))
        for name, value in values.items()
    ]


def _replace(
    graph: gs.Graph,
    node: SparseNode,
    matches: list[_Match],
    solved: SparseLinearWeights,
    tensors: list[TensorSpec],
) -> None:
    """Put the node where its linears were. Its weights are named here and given values in ``_save``."""
    existing = graph.tensors()
    inputs = [existing.get(t.name) or gs.Variable(t.name, _onnx_dtype(t.dtype), t.shape) for t in tensors]
    outputs = [match.y for match in matches]
    merged = outputs[0]
    for match in matches:
        for old in match.nodes:
            old.outputs.clear()
    if len(outputs) > 1:
        channels = dict(zip(solved.linears, solved.out_channels, strict=True))
        sizes = np.array([channels[linear] for linear in node.linears], dtype=np.int64)
        shape = [*outputs[0].shape[:-1], node.out_channels]
        merged = gs.Variable(f"{node.name}.output", outputs[0].dtype, shape)
        split = gs.Constant(f"{node.name}.split", sizes)
        graph.nodes.append(
            gs.Node("Split", f"{node.name}.Split", {"axis": -1}, inputs=[merged, split], outputs=outputs)
        )
    attributes = {
        "rank": node.rank,
        "norm_scale": int(node.norm_scale),
        "has_order": 0,
        "has_centre": 0,
        "has_saliency": 0,
        # With these two, TensorRT takes the plugin and not the function of the same name (which would run dense).
        "plugin_namespace": DOMAIN,
        "plugin_version": OP_VERSION,
    }
    graph.nodes.append(
        gs.Node(OP, node.name, attributes, inputs=[matches[0].x, *inputs], outputs=[merged], domain=DOMAIN)
    )


def _save(
    model: onnx.ModelProto,
    folder: Path,
    tensors: list[TensorSpec],
    external_inputs: tuple[str, ...],
    path: Path,
) -> None:
    """Write all tensors into one safetensors file, refer to them from the model by offset, check and write it."""
    weights = path.with_suffix(".safetensors")
    large = [initializer for initializer in model.graph.initializer if _is_external(initializer)]
    offsets = write_tensors(weights, [*tensors, *(_kept(initializer, folder) for initializer in large)])
    for initializer in large:
        _refer(initializer, weights.name, *offsets[initializer.name])
    for tensor in tensors:
        dtype = _onnx_dtype(tensor.dtype)
        if tensor.name in external_inputs:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, dtype, tensor.shape))
        else:
            initializer = onnx.TensorProto(name=tensor.name, data_type=dtype, dims=tensor.shape)
            _refer(initializer, weights.name, *offsets[tensor.name])
            model.graph.initializer.append(initializer)
    _drop_value_info(model, {tensor.name for tensor in tensors})
    model.functions.append(lynx_function())
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, int(OP_VERSION)))
    model.producer_name = "lynx-compile"
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(
            "rewrite", f"the rewritten ONNX is invalid ({error}).", "Report the model."
        ) from None


def _is_external(initializer: onnx.TensorProto) -> bool:
    return bool(initializer.data_location == onnx.TensorProto.EXTERNAL)


def _kept(initializer: onnx.TensorProto, folder: Path) -> TensorSpec:
    """A weight that stays as it is: its bytes are copied from the dense file's external data."""
    entries = {entry.key: entry.value for entry in initializer.external_data}
    dtype, shape = _TORCH[initializer.data_type], tuple(initializer.dims)
    offset, count = int(entries.get("offset", 0)), int(np.prod(shape, dtype=np.int64))
    source = folder / entries["location"]

    def read() -> torch.Tensor:
        with source.open("rb") as file:
            file.seek(offset)
            data = bytearray(file.read(count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    return TensorSpec(initializer.name, dtype, shape, read)


def _refer(initializer: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make the initializer a view of ``length`` bytes at ``offset`` of the file ``location``."""
    initializer.data_location = onnx.TensorProto.EXTERNAL
    del initializer.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        initializer.external_data.add(key=key, value=value)


def _drop_value_info(model: onnx.ModelProto, names: set[str]) -> None:
    """Initializers and inputs carry their own type; a second statement of it is an error to some readers."""
    kept = [info for info in model.graph.value_info if info.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


_TORCH: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


def _onnx_dtype(dtype: torch.dtype) -> int:
    return next(onnx_dtype for onnx_dtype, torch_dtype in _TORCH.items() if torch_dtype == dtype)


def _torch_dtype(model: onnx.ModelProto) -> torch.dtype:
    """The dtype of the model's activations: that of its first input, the latents."""
    return _TORCH[model.graph.input[0].type.tensor_type.elem_type]
