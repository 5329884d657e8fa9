# SPDX-License-Identifier: Apache-2.0
"""Replace the chosen linears of a dense ONNX graph by Lynx nodes.

Before::

    x ── MatMul(·, Transpose(Wq)) ── Add(bq) ── q        also Gemm(x, W, b) and MatMul without Add
    x ── MatMul(·, Transpose(Wk)) ── Add(bk) ── k
    x ── MatMul(·, Transpose(Wm)) ── Add(bm) ── GELU ── m

After::

    x ── LynxSparseLinear(weight, lora_down, bias) ── Split ── q, k, m

or, where the weights are the 2:4 operand::

    x ── LynxSparseWeightLinear(values, metadata, bias) ── Split ── q, k, m

or, in FP8, ``LynxFp8Linear``, whose activations may be 2:4, and ``LynxFp8SparseWeightLinear``.

A GELU that is all that reads a linear becomes the node's ``activation``. In a merged node its linears come last, and
``activation_from`` is the first of their output channels. It stays in the graph where that is no multiple of 64, on
which the kernels' epilogues cannot start, and where the node has one of the other form.

Where a node with 2:4 weights in 16 bits makes both values of a gated activation (SwiGLU, GEGLU), the rows of its
weight take turns of 8, and it makes half as many channels (``gates``)::

    x ── w1 ── SiLU ── Mul ── y         x ── LynxSparseWeightLinear(w1 and w3 in turns) ── y
    x ── w3 ───────────┘

What makes x then becomes part of the node, so that x is never written: a LayerNorm with its modulation, a GELU that is
in no epilogue, a SiLU or GELU with its gate, if this node is all that reads x::

    h ── LayerNormalization ── Mul(gain) ── Add(shift) ── LynxSparseLinear(...)
    h ── LynxNormSparseLinear(..., gain, shift)

A linear that is called several times becomes as many nodes on the same weights. A convolution of kernel 1 becomes a
node between two Transposes, which bring its channels to the end and back::

    x ── Conv ── y
    x ── Transpose ── LynxSparseWeightLinear ── Transpose ── y

A node with sparse weights in 16 bits has no pass over x to take it into; there TensorRT's own fusions do it. FP8 nodes
all have one, which rounds x.

Linears of one tensor are one node only if they have one form: a dense FP8 node and one with 2:4 weights that read the
same x both round it, and neither can make it.

Requires the node metadata that ``export`` leaves. Ensures that every linear of the plan is either rewritten or
listed with the reason why not, that the file passes ONNX's full check, and that it runs in ONNX Runtime: it
carries the op's meaning as a model-local function.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from onnx.external_data_helper import uses_external_data

from lynx_compile.engine.manifest import Length
from lynx_compile.errors import StageError
from lynx_compile.files.atomic import save_bytes
from lynx_compile.files.digest import file_digest
from lynx_compile.files.onnx_check import check_onnx
from lynx_compile.files.ownership import PRODUCER
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.files.tensors import TORCH_DTYPES, TensorSpec, read_external, refer, write_tensors
from lynx_compile.models.place import device_type
from lynx_compile.ops.fp8_functions import (
    FP8_GATED_OP,
    FP8_GATED_WEIGHT_OP,
    FP8_GELU_OP,
    FP8_GELU_WEIGHT_OP,
    FP8_NORM_OP,
    FP8_NORM_WEIGHT_OP,
    FP8_OP,
    FP8_WEIGHT_OP,
)
from lynx_compile.ops.functions import (
    DOMAIN,
    FUNCTIONS,
    GATED_OP,
    GELU_OP,
    LINEAR_KEY,
    NORM_OP,
    OP,
    OP_VERSION,
    WEIGHT_OP,
    lynx_functions,
)
from lynx_compile.ops.sparse_linear import GATED_RUN, keep_mask
from lynx_compile.ops.sparse_weight_linear import STEP, MetadataLayout, pack_metadata, pack_values
from lynx_compile.passes.compensate import SparseLinearWeights, described_weights, stored_weight
from lynx_compile.passes.export import DenseOnnx
from lynx_compile.passes.fp8_nodes import fp8_tensors
from lynx_compile.passes.gates import Gate, GatedRows, find_gate, note
from lynx_compile.passes.match import DenseGraph, Match, import_graph, match
from lynx_compile.passes.producers import Produced, Producer, find_producer
from lynx_compile.passes.select import SparseGroup, SparsityPlan
from lynx_compile.passes.speed_table import DENSE, DENSE_FP8, Form
from lynx_compile.recipe import NodeOperand


def _by_producer(norm: str, gelu: str, gated: str) -> dict[Producer, str]:
    return {"layer norm": norm, "rms norm": norm, "gelu": gelu, "gated": gated}


REWRITE = StageVersion("rewrite", 8, ("torch", "numpy", "onnx", "onnx-graphsurgeon"))
OPS = {
    Form("activation"): OP,
    Form("weight"): WEIGHT_OP,
    DENSE_FP8: FP8_OP,
    Form("activation", fp8=True): FP8_OP,
    Form("weight", fp8=True): FP8_WEIGHT_OP,
}
# Of the ops that have a pass over x, those that make x in it.
PRODUCER_OPS: dict[str, dict[Producer, str]] = {
    OP: _by_producer(NORM_OP, GELU_OP, GATED_OP),
    FP8_OP: _by_producer(FP8_NORM_OP, FP8_GELU_OP, FP8_GATED_OP),
    FP8_WEIGHT_OP: _by_producer(FP8_NORM_WEIGHT_OP, FP8_GELU_WEIGHT_OP, FP8_GATED_WEIGHT_OP),
}
NORM_OPS = (NORM_OP, FP8_NORM_OP, FP8_NORM_WEIGHT_OP)
PRODUCER_FIELDS = {
    NORM_OP: ("rms", "epsilon"),
    **dict.fromkeys((GELU_OP, FP8_GELU_OP, FP8_GELU_WEIGHT_OP), ("producer_activation",)),
    **dict.fromkeys((GATED_OP, FP8_GATED_OP, FP8_GATED_WEIGHT_OP), ("producer_activation", "halves")),
}
CHANNELS_LAST = (
    ".channels_last"  # ends the name of a tensor of a convolution whose channels were brought to the end
)
# Numbers of a dense weight from which on it is an engine input where weights are external: below FLUX.1-dev's
# x_embedder (64 x 3072), so that no LoRA of such a model changes a constant of the engine.
LARGE = 1 << 17
ACTIVATION_MULTIPLE = 64  # kGeluMultiple of plugins/kernels/tile_config.h


@dataclass(frozen=True)
class DenseLinear:
    """A linear that stays dense, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class SparseNode:
    """One Lynx node and the linears it replaces.

    ``operand``: which one is 2:4; ``none``, with ``fp8`` alone, where neither is. ``fp8``: multiplies in FP8.
    ``out_channels``: of the linears, the rows of their weight. ``activation``: of those from ``activation_from`` on; 0
    for none. ``gated``: the rows of which two make one channel of the output.
    ``producer``: what the node makes its input of, where it does.
    ``errors``: of each linear, expected. ``solved_errors``: the same of the solved weights; others where these are
    tuned. ``tokens``: rows of its input.
    ``gain``: how many times as fast as dense, where the recipe's costs tell.
    ``sizes``: output channels of each linear. ``metadata_layout``: of a 2:4 weight in 16 bits.
    """

    name: str
    linears: tuple[str, ...]
    in_channels: int
    out_channels: int
    rank: int
    norm_scale: bool
    errors: tuple[float, ...]
    operand: NodeOperand = "activation"
    fp8: bool = False
    activation: int = 0
    activation_from: int = 0
    gated: GatedRows | None = None
    producer: Producer | None = None
    tokens: int = 0
    gain: float | None = None
    sizes: tuple[int, ...] = ()
    metadata_layout: MetadataLayout | None = None
    solved_errors: tuple[float, ...] = ()

    @property
    def op(self) -> str:
        op = OPS[Form(self.operand, self.fp8)]
        return PRODUCER_OPS[op][self.producer] if self.producer else op

    @property
    def prepares_x(self) -> bool:
        """Whether the node has a pass over x, which may as well make it."""
        return OPS[Form(self.operand, self.fp8)] in PRODUCER_OPS


@dataclass(frozen=True)
class LynxOnnx:
    """The rewritten file. All large tensors are in ``weights_path``, a safetensors file beside it.

    ``external_inputs``: names of graph inputs, also keys of ``weights_path``, that a runtime binds; () when the
    weights are constants of the graph. ``lengths``: of the inputs' axes that have no fixed one.
    """

    path: Path
    weights_path: Path
    external_inputs: tuple[str, ...]
    sparse: tuple[SparseNode, ...]
    dense: tuple[DenseLinear, ...]
    lengths: tuple[Length, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.sparse)

    @property
    def plugins(self) -> dict[str, tuple[str, ...]]:
        """The plugins that the file needs, each with those of its fields that not every build of it knows."""
        fields: dict[str, tuple[str, ...]] = {}
        for op in FUNCTIONS:
            if nodes := [node for node in self.sparse if node.op == op]:
                activation = any(node.activation and not node.fp8 for node in nodes)
                fields[op] = ("activation", "activation_from") if activation else ()
                fields[op] += PRODUCER_FIELDS.get(op, ())
                fields[op] += ("gated",) if any(node.gated for node in nodes) else ()
        return fields


def rewrite(
    dense: DenseOnnx,
    plan: SparsityPlan,
    weights: Sequence[Path],
    path: Path,
    *,
    external: bool = False,
    metadata_layout: MetadataLayout = 80,
    progress: Progress = no_progress,
) -> LynxOnnx:
    """Write ``path`` (.onnx) and, beside it, NAME.safetensors from a dense file and compensated weights.

    Args:
        weights: what ``compensate`` wrote, one file per group.
        external: make the rewritten linears' weights graph inputs instead of constants, and large dense ones too.
        metadata_layout: of the 2:4 weights; the target GPU's (``trt.metadata_layout``).

    Raises:
        StageError: the dense file is unreadable, or the result is not valid ONNX.
    """
    try:
        model = onnx.load(dense.path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no common base with OSError
        raise StageError(
            "rewrite", f"{dense.path} cannot be read ({error}).", "Run again with --fresh."
        ) from None
    dtype = _torch_dtype(model)
    imported = import_graph(model, dtype, dense.path.parent)
    graph = imported.graph
    decisions = {decision.linear.path: decision for decision in plan.decisions}
    refused = {path: decision.reason for path, decision in decisions.items() if decision.form == DENSE}
    groups = {linear.path: group for group in plan.groups for linear in group.linears}
    names: set[str] = set()
    nodes: list[SparseNode] = []
    tensors: list[TensorSpec] = []
    for file in weights:
        solved = described_weights(file)
        linears = [decisions[linear].linear for linear in solved.linears]
        matches, reasons = match(imported, linears)
        refused |= reasons
        owned: dict[
            tuple[str | GatedRows | None, ...], list[TensorSpec]
        ] = {}  # linears called again: the same weights
        for readers in _readers_of_one_tensor(matches):
            gate = _gate(readers, solved, imported)
            found = _without_gelu(readers) if gate else _with_activation(readers, solved)
            node = _describe(found, solved, groups[next(iter(readers))], names, metadata_layout, gate)
            key = (*node.linears, node.gated)
            if key not in owned:
                if node.fp8:
                    rows, sparse = _rows(node, solved), node.operand == "weight"
                    owned[key] = fp8_tensors(node.name, rows, node.in_channels, file, dtype, sparse=sparse)
                elif node.operand == "weight":
                    owned[key] = _weight_tensors(node, solved, file, dtype, metadata_layout)
                else:
                    owned[key] = _tensors(node, solved, file, dtype)
                tensors += owned[key]
            attributes = _attributes(node, metadata_layout)
            _replace(graph, node, attributes, found, solved, owned[key], gate)
            nodes.append(node)
    graph.cleanup(remove_unused_graph_inputs=False)  # of what has read the same tensors as the new nodes
    fills: dict[str, TensorSpec] = {}
    nodes = _fuse_producers(nodes, imported, fills)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    ops = {node.op for node in nodes}
    everything = [*tensors, *fills.values()]
    rewritten = gs.export_onnx(graph)
    external_inputs: tuple[str, ...] = ()
    if external:
        external_inputs = (*(tensor.name for tensor in tensors), *_large_weights(rewritten.graph))
    gated = {node.name: node.gated for node in nodes if node.gated}
    for in_file in rewritten.graph.node:
        if in_file.name in gated:
            note(in_file, gated[in_file.name])
    _save(rewritten, dense.path.parent, everything, external_inputs, ops, path, progress)
    left = tuple(DenseLinear(linear, reason) for linear, reason in refused.items())
    return LynxOnnx(
        path,
        path.with_name(f"{path.name.removesuffix('.onnx')}.safetensors"),
        external_inputs,
        tuple(nodes),
        left,
        dense.lengths,
    )


def graph_digest(lynx: LynxOnnx) -> str:
    """SHA-256 over the rewritten file and its constants, without the weights that a runtime binds."""
    digest = hashlib.sha256(file_digest(lynx.path).encode())
    for initializer in onnx.load(lynx.path, load_external_data=False).graph.initializer:
        if uses_external_data(initializer):
            digest.update(
                read_external(initializer, lynx.path.parent).flatten().view(torch.uint8).numpy().data
            )
    return digest.hexdigest()


def _readers_of_one_tensor(matches: Mapping[str, Sequence[Match]]) -> list[dict[str, Match]]:
    """The calls of the linears by the tensor that they read in the graph: one node each.

    As a rule all of a group read one tensor; linears that are called several times read several.
    """
    readers: dict[tuple[str, bool], list[dict[str, Match]]] = defaultdict(list)
    for linear, calls in matches.items():
        for found in calls:
            nodes = readers[found.x.name, found.convolution]
            free = next((node for node in nodes if linear not in node), None)
            if free is None:
                nodes.append(free := {})
            free[linear] = found
    return [node for nodes in readers.values() for node in nodes]


def _gate(matches: Mapping[str, Match], solved: SparseLinearWeights, dense: DenseGraph) -> Gate | None:
    """The gated activation behind the linears of a node, where its epilogue can hold one and gains by it.

    In FP8 it loses more than the reader's pass, which has to round x anyway, takes for the gate (plugins/TUNING.md, 8).
    """
    holds = solved.operand == "weight" and not solved.fp8
    if not holds or any(found.convolution for found in matches.values()):
        return None
    gate = find_gate(matches, dense)
    if gate is None or gate.rows.channels % (GATED_RUN // 2):
        return None
    channels = dict(zip(solved.linears, solved.out_channels, strict=True))
    plain = sum(channels[linear] for linear in matches) - 2 * gate.rows.channels
    return None if plain % ACTIVATION_MULTIPLE else gate


def _without_gelu(matches: Mapping[str, Match]) -> dict[str, Match]:
    return {linear: replace(found, gelu=(), activation=0) for linear, found in matches.items()}


def _with_activation(matches: Mapping[str, Match], solved: SparseLinearWeights) -> dict[str, Match]:
    """The linears of a node in its order, those with a GELU last; without their GELUs where no epilogue can start.

    An epilogue has one form of GELU: that of the first linear with one.
    """
    form = next((found.activation for found in matches.values() if found.activation), 0)
    of_form = {
        linear: found if found.activation == form else replace(found, gelu=(), activation=0)
        for linear, found in matches.items()
    }
    ordered = dict(sorted(of_form.items(), key=lambda item: bool(item[1].gelu)))
    channels = dict(zip(solved.linears, solved.out_channels, strict=True))
    if sum(channels[linear] for linear, found in ordered.items() if not found.gelu) % ACTIVATION_MULTIPLE:
        return _without_gelu(matches)
    return ordered


def _describe(
    matches: Mapping[str, Match],
    solved: SparseLinearWeights,
    group: SparseGroup,
    names: set[str],
    layout: MetadataLayout,
    gate: Gate | None,
) -> SparseNode:
    """The node of ``matches``, under a name that is not among ``names`` yet."""
    channels = dict(zip(solved.linears, solved.out_channels, strict=True))
    rows = sum(channels[linear] for linear in matches)
    plain = sum(channels[linear] for linear, found in matches.items() if not found.gelu)
    activation = gate.activation if gate else max(found.activation for found in matches.values())
    if gate:
        plain = rows - 2 * gate.rows.channels
    errors = dict(zip(solved.linears, solved.errors, strict=True))
    solved_errors = dict(zip(solved.linears, solved.solved_errors or solved.errors, strict=True))
    name = f"{next(linear for linear in solved.linears if linear in matches)}.{OPS[Form(solved.operand, solved.fp8)]}"
    free = (f"{name}.{call}" if call > 1 else name for call in count(1))
    names.add(name := next(one for one in free if one not in names))
    return SparseNode(
        name=name,
        linears=tuple(matches),
        in_channels=solved.in_channels,
        out_channels=rows,
        rank=solved.rank,
        norm_scale=solved.norm_scale,
        errors=tuple(errors[linear] for linear in matches),
        operand=solved.operand,
        fp8=solved.fp8,
        activation=activation,
        activation_from=plain if activation else 0,
        gated=gate.rows if gate else None,
        tokens=_tokens(next(iter(matches.values()))) or group.tokens,
        gain=group.gain,
        sizes=tuple(channels[linear] for linear in matches),
        metadata_layout=layout if solved.operand == "weight" and not solved.fp8 else None,
        solved_errors=tuple(solved_errors[linear] for linear in matches),
    )


def _tokens(found: Match) -> int | None:
    """Rows of what a linear reads; None where the graph does not tell."""
    shape = list(found.x.shape or ())
    if not shape or not all(isinstance(extent, int) for extent in shape):
        return None
    shape.pop(1 if found.convolution else -1)
    return int(np.prod(shape, dtype=np.int64))


def _tensors(
    node: SparseNode, solved: SparseLinearWeights, file: Path, dtype: torch.dtype
) -> list[TensorSpec]:
    """Weight, lora_down and bias of a node; read from ``file`` only when they are written."""
    rows = _rows(node, solved)

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            tensor = stored_weight(file, name)
            return (tensor if name == "lora_down" else _taken(tensor, rows)).to(dtype)

        return read

    shapes = {
        "weight": (node.out_channels, solved.weight.shape[1]),
        "lora_down": tuple(solved.lora_down.shape),
        "bias": (node.out_channels,),
    }
    return [TensorSpec(f"{node.name}.{name}", dtype, shape, reader(name)) for name, shape in shapes.items()]


def _weight_tensors(
    node: SparseNode, solved: SparseLinearWeights, file: Path, dtype: torch.dtype, layout: MetadataLayout
) -> list[TensorSpec]:
    """Values, metadata and bias of a node with 2:4 weights; packed from ``file`` only when they are written."""
    rows = _rows(node, solved)
    padded, channels = -(-node.out_channels // STEP) * STEP, node.in_channels

    def weight() -> torch.Tensor:
        return _taken(stored_weight(file, "weight").to(device_type()), rows)  # where packing takes no time

    def values() -> torch.Tensor:
        kept = weight()
        return pack_values(kept.to(dtype), keep_mask(kept))

    def metadata() -> torch.Tensor:
        return pack_metadata(keep_mask(weight()), layout)

    def bias() -> torch.Tensor:
        return _taken(stored_weight(file, "bias"), rows).to(dtype)

    return [
        TensorSpec(f"{node.name}.values", dtype, (padded, channels // 2), values),
        TensorSpec(
            f"{node.name}.metadata",
            torch.int32,
            (channels // STEP, padded // STEP, 2 * STEP),
            metadata,
        ),
        TensorSpec(f"{node.name}.bias", dtype, (node.out_channels,), bias),
    ]


def _rows(node: SparseNode, solved: SparseLinearWeights) -> list[int]:
    """The rows of ``solved`` in the order of the node's linears, or as its gates want them."""
    ends = np.cumsum(solved.out_channels).tolist()
    rows_of = {
        linear: range(end - size, end)
        for linear, size, end in zip(solved.linears, solved.out_channels, ends, strict=True)
    }
    rows = [row for linear in node.linears for row in rows_of[linear]]
    return rows if node.gated is None else [rows[row] for row in node.gated.order()]


def _taken(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows; most nodes take all of them as they are."""
    return tensor if rows == list(range(len(tensor))) else tensor[rows]


def _attributes(node: SparseNode, metadata_layout: MetadataLayout) -> dict[str, int | str]:
    if node.fp8 and node.operand == "weight":
        own = {"out_channels": node.out_channels}
    elif node.fp8:
        own = {"prune": int(node.operand == "activation")}
    elif node.operand == "weight":
        own = {"metadata_layout": metadata_layout, "out_channels": node.out_channels}
    else:
        own = {"rank": node.rank, "norm_scale": int(node.norm_scale)}
    if node.fp8 or node.operand == "weight":
        own["gated"] = int(node.gated is not None)
    return {
        **own,
        "activation": node.activation,
        "activation_from": node.activation_from,
        # With these two, TensorRT takes the plugin and not the function of the same name (which would run dense).
        "plugin_namespace": DOMAIN,
        "plugin_version": OP_VERSION,
    }


def _replace(
    graph: gs.Graph,
    node: SparseNode,
    attributes: dict[str, int | str],
    matches: Mapping[str, Match],
    solved: SparseLinearWeights,
    tensors: list[TensorSpec],
    gate: Gate | None,
) -> None:
    """Put the node where its linears were. Its weights are named here and given values in ``_save``."""
    existing = graph.tensors()
    inputs = [existing.get(t.name) or gs.Variable(t.name, _onnx_dtype(t.dtype), t.shape) for t in tensors]
    outputs = [matches[linear].y for linear in node.linears]
    x = matches[node.linears[0]].x
    for linear in node.linears:
        for old in (*matches[linear].nodes, *matches[linear].gelu):
            old.outputs.clear()
    if matches[node.linears[0]].convolution:
        x, outputs = _channels_last(graph, x), [_channels_first(graph, y) for y in outputs]
    channels = dict(zip(solved.linears, solved.out_channels, strict=True))
    sizes = np.array([channels[linear] for linear in node.linears], dtype=np.int64)
    if gate:
        outputs = [*gate.pieces, gate.y]
        sizes = np.array([tensor.shape[-1] for tensor in outputs], dtype=np.int64)
        for old in gate.nodes:
            old.outputs.clear()
        for tensor in outputs:
            tensor.inputs.clear()
    merged = outputs[0]
    if len(outputs) > 1:
        shape = [*outputs[0].shape[:-1], int(sizes.sum())]
        merged = gs.Variable(f"{node.name}.output", outputs[0].dtype, shape)
        split = gs.Constant(f"{node.name}.split", sizes)
        graph.nodes.append(
            gs.Node("Split", f"{node.name}.Split", {"axis": -1}, inputs=[merged, split], outputs=outputs)
        )
    graph.nodes.append(
        gs.Node(node.op, node.name, attributes, inputs=[x, *inputs], outputs=[merged], domain=DOMAIN)
    )


def _channels_last(graph: gs.Graph, x: gs.Variable) -> gs.Variable:
    """x [batch, channels, pixels ...] as [batch, pixels ..., channels]."""
    name = f"{x.name}{CHANNELS_LAST}"
    made = [output for reader in x.outputs for output in reader.outputs if output.name == name]
    if made:  # for another node that reads x
        return made[0]
    moved = gs.Variable(name, x.dtype, [x.shape[0], *x.shape[2:], x.shape[1]])
    perm = [0, *range(2, len(moved.shape)), 1]
    graph.nodes.append(gs.Node("Transpose", f"{moved.name}.Transpose", {"perm": perm}, [x], [moved]))
    return moved


def _channels_first(graph: gs.Graph, y: gs.Variable) -> gs.Variable:
    """A new tensor [batch, pixels ..., channels] that makes y [batch, channels, pixels ...]."""
    moved = gs.Variable(f"{y.name}{CHANNELS_LAST}", y.dtype, [y.shape[0], *y.shape[2:], y.shape[1]])
    perm = [0, len(moved.shape) - 1, *range(1, len(moved.shape) - 1)]
    graph.nodes.append(gs.Node("Transpose", f"{moved.name}.Transpose", {"perm": perm}, [moved], [y]))
    return moved


def _fuse_producers(
    nodes: Sequence[SparseNode], dense: DenseGraph, fills: dict[str, TensorSpec]
) -> list[SparseNode]:
    """Let nodes that prune or round their x make it too, where they can. ``fills``: gets gains of 1, shifts of 0."""
    in_graph = {node.name: node for node in dense.graph.nodes}
    return [
        _fuse_producer(in_graph[node.name], node, dense, fills) if node.prepares_x else node for node in nodes
    ]


def _fuse_producer(
    in_graph: gs.Node, node: SparseNode, dense: DenseGraph, fills: dict[str, TensorSpec]
) -> SparseNode:
    produced = find_producer(in_graph.inputs[0], dense)
    if produced is None:
        return node
    node = replace(node, producer=produced.producer)
    in_graph.op = node.op
    in_graph.inputs[0] = produced.x
    if node.op in NORM_OPS:
        in_graph.attrs |= {"rms": int(produced.producer == "rms norm"), "epsilon": produced.epsilon}
        in_graph.inputs.extend(_gain_and_shift(produced, node, dense, fills))
    else:
        in_graph.attrs["producer_activation"] = produced.activation
    if produced.gate is not None:
        in_graph.attrs["halves"] = produced.halves
        in_graph.inputs.append(produced.gate)
    return node


def _gain_and_shift(
    produced: Produced, node: SparseNode, dense: DenseGraph, fills: dict[str, TensorSpec]
) -> tuple[gs.Tensor, gs.Tensor]:
    """The two inputs of a norm, which have as many rows: products of what the graph has, or filled."""

    def filled(value: int) -> gs.Tensor:
        shape = (produced.rows, node.in_channels)
        name = f"lynx.{('zeros', 'ones')[value]}.{shape[0]}x{shape[1]}"
        fill = partial(torch.full, shape, value, dtype=dense.dtype)
        fills.setdefault(name, TensorSpec(name, dense.dtype, shape, fill))
        return dense.graph.tensors().get(name) or gs.Variable(name, _onnx_dtype(dense.dtype), shape)

    own = partial(_in_dtype_of, produced.x, dense.graph)
    gain, *factors = [own(each) for each in produced.gains] or [filled(1)]
    for number, factor in enumerate(factors):
        product = gs.Variable(f"{node.name}.gain.{number}", produced.x.dtype)
        dense.graph.nodes.append(
            gs.Node("Mul", f"{product.name}.Mul", inputs=[gain, factor], outputs=[product])
        )
        gain = product
    return gain, filled(0) if produced.shift is None else own(produced.shift)


def _in_dtype_of(x: gs.Variable, graph: gs.Graph, tensor: gs.Tensor) -> gs.Tensor:
    """``tensor``, what it was before a Cast, or a Cast of it."""
    if tensor.dtype == x.dtype:
        return tensor
    cast = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if cast is not None and cast.op == "Cast" and cast.inputs[0].dtype == x.dtype:
        return cast.inputs[0]
    name = f"{tensor.name}.rounded"
    made = graph.tensors().get(name)  # for another node that reads it
    if made is None:
        made = gs.Variable(name, x.dtype, tensor.shape)
        to = onnx.helper.np_dtype_to_tensor_dtype(x.dtype) if isinstance(x.dtype, np.dtype) else x.dtype
        graph.nodes.append(gs.Node("Cast", f"{name}.Cast", {"to": int(to)}, [tensor], [made]))
    return made


def _large_weights(graph: onnx.GraphProto) -> list[str]:
    """Weights of dense linears that a builder would hold twice and write into its engine, by name."""
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    return [
        tensor.name
        for tensor in graph.initializer
        if uses_external_data(tensor)
        and len(tensor.dims) == 2
        and int(np.prod(tensor.dims)) >= LARGE
        and readers[tensor.name] <= {"Transpose", "MatMul", "Gemm"}
    ]


def _save(
    model: onnx.ModelProto,
    folder: Path,
    tensors: list[TensorSpec],
    external_inputs: tuple[str, ...],
    ops: Iterable[str],
    path: Path,
    progress: Progress,
) -> None:
    """Write all tensors into one safetensors file, refer to them from the model by offset, check and write it."""
    weights = path.with_name(f"{path.name.removesuffix('.onnx')}.safetensors")
    large = [initializer for initializer in model.graph.initializer if uses_external_data(initializer)]
    kept = [_kept(initializer, folder) for initializer in large]
    offsets = write_tensors(weights, [*tensors, *kept], {"producer": PRODUCER}, progress)
    for initializer in large:
        refer(initializer, weights.name, *offsets[initializer.name])
        if initializer.name in external_inputs:
            info = onnx.helper.make_tensor_value_info(
                initializer.name, initializer.data_type, initializer.dims
            )
            model.graph.input.append(info)
            model.graph.initializer.remove(initializer)
    for tensor in tensors:
        dtype = _onnx_dtype(tensor.dtype)
        if tensor.name in external_inputs:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, dtype, tensor.shape))
        else:
            initializer = onnx.TensorProto(name=tensor.name, data_type=dtype, dims=tensor.shape)
            refer(initializer, weights.name, *offsets[tensor.name])
            model.graph.initializer.append(initializer)
    _drop_value_info(model, {tensor.name for tensor in tensors})
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    model.functions.extend(lynx_functions(ops, opset))
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, int(OP_VERSION)))
    model.producer_name = PRODUCER
    save_bytes(path, model.SerializeToString())
    if problem := check_onnx(path):
        raise StageError("rewrite", f"the rewritten ONNX is invalid ({problem}).", "Report the model.")


def _kept(initializer: onnx.TensorProto, folder: Path) -> TensorSpec:
    """A weight that stays as it is: its bytes are copied from the dense file's external data."""
    dtype, shape = TORCH_DTYPES[initializer.data_type], tuple(initializer.dims)
    return TensorSpec(initializer.name, dtype, shape, partial(read_external, initializer, folder))


def _drop_value_info(model: onnx.ModelProto, names: set[str]) -> None:
    """Initializers and inputs carry their own type; a second statement of it is an error to some readers."""
    kept = [info for info in model.graph.value_info if info.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def _onnx_dtype(dtype: torch.dtype) -> int:
    return next(onnx_dtype for onnx_dtype, torch_dtype in TORCH_DTYPES.items() if torch_dtype == dtype)


def _torch_dtype(model: onnx.ModelProto) -> torch.dtype:
    """The dtype of the linears' weights, which is that of what they read; the most frequent one.

    The graph's inputs do not tell: the first may be a timestep or a token's number.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    transposed = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Transpose"}
    products = (n for n in model.graph.node for entry in n.metadata_props if entry.key == LINEAR_KEY)
    weights = Counter(types.get(transposed.get(node.input[1], node.input[1])) for node in products)
    del weights[None]
    if not weights:
        raise StageError(
            "rewrite", "the dense ONNX holds no linear with a constant weight.", "Report the model."
        )
    return TORCH_DTYPES[weights.most_common(1)[0][0] or 0]
