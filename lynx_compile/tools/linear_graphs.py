# SPDX-License-Identifier: Apache-2.0
"""Two ONNX graphs whose outputs are the sparse linears' results on the dense model's own activations.

    dense:  the dense graph                             ── y of every linear
    lynx:   the dense graph ── x ── LynxSparse...Linear ── y of every linear

Rewriting has kept the names of the tensors x, so that the Lynx nodes fit into the dense graph; where x is two linears'
results side by side, which are apart in the dense graph, they are put together. y is the linear's own result: an
activation that a node holds is off here, and rows that it has in turns are put in order again. Of a convolution it has
the channels last.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from lynx_compile.engine.manifest import Manifest, SparseLinears
from lynx_compile.engine.trt import PLUGIN_NAMESPACE as DOMAIN
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import atomic_path
from lynx_compile.ops.functions import LINEAR_KEY
from lynx_compile.passes.gates import GatedRows, noted
from lynx_compile.passes.rewrite import CHANNELS_LAST


@dataclass(frozen=True)
class Part:
    """The two files for some of the linears. ``linears``: {name of an output, the same in both: module path}."""

    dense: Path
    lynx: Path
    linears: Mapping[str, str]


def linear_graphs(
    dense: Path, lynx: Path, manifest: Manifest, memory_gib: float, folder: Path
) -> tuple[Part, ...]:
    """Write the graphs into ``folder``, where ``dense`` and ``lynx`` are, in parts whose outputs fit ``memory_gib``.

    Raises:
        InputError: the two files do not belong together.
    """
    dense_model, lynx_model = (onnx.load(path, load_external_data=False) for path in (dense, lynx))
    nodes = {node.name: node for node in lynx_model.graph.node}
    if {node.name for node in nodes.values() if node.domain == DOMAIN} != {s.layer for s in manifest.sparse}:
        raise InputError(
            f"{lynx.name}: its Lynx nodes are not the manifest's layers.", "Compile the engine again."
        )
    results = _results(dense_model, manifest, nodes)
    parts = []
    for number, layers in enumerate(_groups(manifest, memory_gib)):
        part = Part(
            dense=folder / f"linears-{number}-dense.onnx",
            lynx=folder / f"linears-{number}-lynx.onnx",
            linears={_output(layer, linear): linear for layer in layers for linear in layer.linears},
        )
        _save(_with_outputs(dense_model, layers, results), part.linears, part.dense)
        _save(_with_nodes(dense_model, lynx_model, layers, nodes, results), part.linears, part.lynx)
        parts.append(part)
    return tuple(parts)


def _groups(manifest: Manifest, memory_gib: float) -> list[list[SparseLinears]]:
    """The layers in order, split where the outputs of both graphs would take too much memory."""
    groups: list[list[SparseLinears]] = [[]]
    used, limit = 0.0, memory_gib * 2**30
    for layer in manifest.sparse:
        size = 2 * 4 * layer.tokens * layer.out_channels
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0.0
        groups[-1].append(layer)
        used += size
    return groups


def _output(layer: SparseLinears, linear: str) -> str:
    """A name that no tensor of the model has; a linear that is called several times is in several layers."""
    return f"{layer.layer}:{linear}"


def _last(layer: SparseLinears, nodes: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto:
    """The node that makes the linears' tensors, one each: the layer's own, or the Split behind it."""
    return nodes.get(f"{layer.layer}.Split", nodes[layer.layer])


@dataclass(frozen=True)
class _Result:
    """Of a linear in the dense graph: its product, and ``y``, the name of what it makes of that."""

    product: onnx.NodeProto
    y: str


def _results(
    dense: onnx.ModelProto, manifest: Manifest, nodes: Mapping[str, onnx.NodeProto]
) -> dict[str, list[_Result]]:
    """Of every layer's linears, by the layer's name."""
    products: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in dense.graph.node:
        for entry in node.metadata_props:
            if entry.key == LINEAR_KEY:
                products[entry.value].append(node)
        for name in node.input:
            readers[name].append(node)
    found: dict[str, list[_Result]] = {}
    calls: Counter[tuple[str, ...]] = Counter()
    for layer in manifest.sparse:
        gated = noted(nodes[layer.layer]) is not None
        ends = _ends(layer, nodes, products, readers) if gated else list(_last(layer, nodes).output)
        if not gated and _is_read_whole(
            layer, nodes
        ):  # the names of its linears' results are gone: the calls are in order
            of_call = [products[linear][calls[layer.linears]] for linear in layer.linears]
            found[layer.layer] = [_Result(product, _own_result(product, "", readers)) for product in of_call]
        else:
            made = [
                _product_of(products[linear], end, readers)
                for linear, end in zip(layer.linears, ends, strict=True)
            ]
            found[layer.layer] = [
                _Result(product, _own_result(product, end, readers))
                for product, end in zip(made, ends, strict=True)
            ]
        calls[layer.linears] += 1
    return found


def _is_read_whole(layer: SparseLinears, nodes: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a node reads two linears' results as halves of one tensor, so that nothing splits it."""
    return len(layer.linears) > len(_last(layer, nodes).output)


def _with_outputs(
    dense: onnx.ModelProto, layers: list[SparseLinears], results: Mapping[str, list[_Result]]
) -> onnx.ModelProto:
    model = _copy(dense)
    pixels = {weight.name: len(weight.dims) - 2 for weight in dense.graph.initializer}
    for layer in layers:
        for linear, result in zip(layer.linears, results[layer.layer], strict=True):
            product, y = result.product, result.y
            if product.op_type == "Conv":  # its layer has the channels last
                perm = [0, *range(2, 2 + pixels[product.input[1]]), 1]
                node = onnx.helper.make_node("Transpose", [y], [_output(layer, linear)], perm=perm)
            else:
                node = onnx.helper.make_node("Identity", [y], [_output(layer, linear)])
            model.graph.node.append(node)
    return model


def _ends(
    layer: SparseLinears,
    nodes: Mapping[str, onnx.NodeProto],
    products: Mapping[str, Sequence[onnx.NodeProto]],
    readers: Mapping[str, list[onnx.NodeProto]],
) -> list[str]:
    """For each linear, a tensor that a layer with a gate makes of it: of both that the gate joins, the last one."""
    outputs = list(_last(layer, nodes).output)
    own = ({_own_result(call, "", readers) for call in products[linear]} for linear in layer.linears)
    return [next((output for output in outputs if output in results), outputs[-1]) for results in own]


def _product_of(
    calls: Sequence[onnx.NodeProto], end: str, readers: Mapping[str, list[onnx.NodeProto]]
) -> onnx.NodeProto:
    """The call of a linear that ends in ``end``: the nearest before it."""
    if not calls:
        raise InputError(f"The dense ONNX does not say what '{end}' comes from.", "Compile the engine again.")
    reached = {node.output[0]: node for node in reversed(calls)}
    while len(calls) > 1 and end.removesuffix(CHANNELS_LAST) not in reached:
        ahead = {made: node for name, node in reached.items() for r in readers[name] for made in r.output}
        if not ahead.keys() - reached.keys():
            break
        reached = ahead | reached
    return reached.get(end.removesuffix(CHANNELS_LAST), calls[0])


def _own_result(product: onnx.NodeProto, end: str, readers: Mapping[str, list[onnx.NodeProto]]) -> str:
    """What a linear makes of its product: its bias added, but without an activation that ends in ``end``."""
    y, behind = str(product.output[0]), readers[product.output[0]]
    if product.op_type != "MatMul" or y == end or len(behind) != 1 or behind[0].op_type != "Add":
        return y
    return str(behind[0].output[0])


def _with_nodes(
    dense: onnx.ModelProto,
    lynx: onnx.ModelProto,
    layers: list[SparseLinears],
    nodes: Mapping[str, onnx.NodeProto],
    results: Mapping[str, list[_Result]],
) -> onnx.ModelProto:
    model = _copy(dense)
    wholes = {nodes[name].output[0]: [result.y for result in own] for name, own in results.items()}
    constants = {tensor.name: tensor for tensor in lynx.graph.initializer}
    made = {name for node in dense.graph.node for name in node.output}
    transposes = {node.output[0]: node for node in lynx.graph.node if node.op_type == "Transpose"}
    used: dict[str, onnx.TensorProto] = {}
    for layer in layers:
        node, last = nodes[layer.layer], _last(layer, nodes)
        gated = noted(node)
        outputs = [_output(layer, linear) for linear in layer.linears]
        if gated is not None:
            last, names = node, {node.output[0]: f"{layer.layer}:rows"}
        elif _is_read_whole(layer, nodes):
            whole = f"{layer.layer}:whole"
            model.graph.node.append(onnx.helper.make_node("Split", [whole], outputs, axis=-1, num_outputs=2))
            names = {last.output[0]: whole}
        else:
            names = dict(zip(last.output, outputs, strict=True))
        if node.input[0] in wholes and node.input[0] not in made:
            model.graph.node.append(
                onnx.helper.make_node("Concat", wholes[node.input[0]], [node.input[0]], axis=-1)
            )
            made.add(node.input[0])
        if node.input[0] in transposes and node.input[0] not in made:
            model.graph.node.append(transposes[node.input[0]])
            made.add(node.input[0])
        for original in (node,) if last is node else (node, last):
            copy = model.graph.node.add()
            copy.CopyFrom(original)
            copy.output[:] = [names.get(name, name) for name in original.output]
            for attribute in copy.attribute:
                if attribute.name in ("activation", "gated"):
                    attribute.i = 0
            used |= {name: constants[name] for name in original.input if name in constants}
        if gated is not None:
            model.graph.node.extend(_in_order(gated, layer))
    model.graph.initializer.extend(used.values())
    model.functions.extend(lynx.functions)
    domains = {entry.domain for entry in model.opset_import}
    model.opset_import.extend(entry for entry in lynx.opset_import if entry.domain not in domains)
    return model


def _in_order(gated: GatedRows, layer: SparseLinears) -> list[onnx.NodeProto]:
    """What makes the linears' results of a layer's rows, which are in turns."""

    def constant(name: str, values: Sequence[int]) -> onnx.NodeProto:
        return onnx.helper.make_node("Constant", [], [f"{layer.layer}:{name}"], value_ints=list(values))

    rows, order, ordered, sizes = (f"{layer.layer}:{name}" for name in ("rows", "order", "ordered", "sizes"))
    outputs = [_output(layer, linear) for linear in layer.linears]
    return [
        constant("order", np.argsort(gated.order()).tolist()),
        constant("sizes", gated.linears),
        onnx.helper.make_node("Gather", [rows, order], [ordered], axis=-1),
        onnx.helper.make_node("Split", [ordered, sizes], outputs, axis=-1),
    ]


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    return copy


def _save(model: onnx.ModelProto, outputs: Iterable[str], path: Path) -> None:
    made = {name for node in model.graph.node for name in node.output}
    made |= {value.name for value in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:
        if missing := [name for name in node.input if name and name not in made]:
            raise InputError(
                f"The dense ONNX has no tensor '{missing[0]}', which '{node.name or node.output[0]}' reads.",
                "Compile the engine again.",
            )
    for name in outputs:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
