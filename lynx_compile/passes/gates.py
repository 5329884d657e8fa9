# SPDX-License-Identifier: Apache-2.0
"""Find a gated activation behind linears that read one tensor, which an epilogue can hold where it has both values.

Before, in any order of the operands::

    x ── Linear(w1) ── Activation ── Mul ── y          also with the two linears as halves of one, cut by Split or
    x ── Linear(w3) ────────────────┘                  Slices, or as the last part of one that makes q, k and v too

After::

    x ── LynxSparseWeightLinear(rows of w1 and w3 in turns of 8) ── y
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import onnx
import onnx_graphsurgeon as gs

from lynx_compile.ops.sparse_weight_linear import gated_order
from lynx_compile.passes.match import STEPS, DenseGraph, Match, activation_of
from lynx_compile.passes.sections import Section, cut_of, section_of


@dataclass(frozen=True)
class GatedRows:
    """Which of the rows of a node's linears, one linear behind the other, are activated, and which are their gates.

    ``x``, ``gate``: the first of each. ``channels``: how many each. ``linears``: how many rows each linear has.
    """

    x: int
    gate: int
    channels: int
    linears: tuple[int, ...]

    def order(self) -> list[int]:
        """All rows as the op wants them: those left alone, then in turns 8 to activate and their 8 gates."""
        return gated_order(sum(self.linears), self.x, self.gate, self.channels)


GATED_KEY = "lynx.gated_rows"  # metadata of a node whose epilogue has a gate: what ``note`` writes


def note(node: onnx.NodeProto, rows: GatedRows) -> None:
    """Write into a node where the rows of its linears went."""
    node.metadata_props.append(onnx.StringStringEntryProto(key=GATED_KEY, value=json.dumps(asdict(rows))))


def noted(node: onnx.NodeProto) -> GatedRows | None:
    """What ``note`` wrote; None where the node has no gate."""
    for entry in node.metadata_props:
        if entry.key == GATED_KEY:
            values = json.loads(entry.value)
            return GatedRows(**values | {"linears": tuple(values["linears"])})
    return None


@dataclass(frozen=True)
class Gate:
    """``y`` = activation(rows.x) * rows.gate.

    ``pieces``: what else of the linears' channels the graph reads, in their order. ``nodes``: what becomes needless.
    """

    activation: int
    rows: GatedRows
    y: gs.Variable
    pieces: tuple[gs.Variable, ...]
    nodes: tuple[gs.Node, ...]


def find_gate(matches: Mapping[str, Match], dense: DenseGraph) -> Gate | None:
    """The first gated activation of what the linears make; none where something else reads what it is made of."""
    results = [match.nodes[-1].outputs[0] for match in matches.values()]
    for y in results:
        for x in _cuts(y):
            for activation in STEPS:
                if (gate := _gate_of(x, activation, results, dense)) is not None:
                    return gate
    return None


def _cuts(tensor: gs.Variable) -> Iterator[gs.Variable]:
    """The tensor, and what is cut out of it, directly or not."""
    yield tensor
    for node in tensor.outputs:
        for output in node.outputs:
            cut = cut_of(output)
            if cut is not None and cut.whole is tensor:
                yield from _cuts(output)


def _gate_of(
    x: gs.Variable, activation: int, results: Sequence[gs.Variable], dense: DenseGraph
) -> Gate | None:
    """The gated activation of ``x``."""
    chain = activation_of(x, activation, dense)
    product = chain[-1].outputs[0].outputs if chain else []
    if len(product) != 1 or product[0].op != "Mul":
        return None
    gate = next((other for other in product[0].inputs if other is not chain[-1].outputs[0]), None)
    if not isinstance(gate, gs.Variable) or gate.shape != x.shape or gate is x:
        return None
    of_x, of_gate = section_of(x), section_of(gate)
    starts = _starts(results)
    if starts is None or id(of_x.whole) not in starts or id(of_gate.whole) not in starts:
        return None
    hidden = {id(chain[-1].outputs[0]), id(x), id(gate)} | {id(node.inputs[0]) for node in of_x.nodes}
    hidden |= {id(node.inputs[0]) for node in of_gate.nodes}
    allowed = {id(node) for node in (*chain, *product)}
    pieces = _pieces(results, (of_x, of_gate), {id(x), id(gate)}, allowed)
    if pieces is None or any(id(output) in hidden for output in dense.graph.outputs):
        return None
    rows = GatedRows(
        x=starts[id(of_x.whole)] + of_x.first,
        gate=starts[id(of_gate.whole)] + of_gate.first,
        channels=of_x.end - of_x.first,
        linears=tuple(y.shape[-1] for y in results),
    )
    cuts = (*of_x.nodes, *of_gate.nodes)
    return Gate(activation, rows, product[0].outputs[0], pieces, (*chain, *product, *cuts))


def _starts(results: Sequence[gs.Variable]) -> dict[int, int] | None:
    """The first row of each of the linears by its result, one behind the other."""
    starts: dict[int, int] = {}
    row = 0
    for y in results:
        if not y.shape or not isinstance(y.shape[-1], int):
            return None
        starts[id(y)] = row
        row += y.shape[-1]
    return starts


def _pieces(
    results: Sequence[gs.Variable], pair: tuple[Section, Section], taken: set[int], allowed: set[int]
) -> tuple[gs.Variable, ...] | None:
    """What remains of the results beside the pair; None where it is not cut off cleanly."""
    pieces: list[gs.Variable] = []
    for y in results:
        sections = [section for section in pair if section.whole is y]
        if not sections:
            pieces.append(y)
            continue
        rest = _rest(y, sections, taken, allowed)
        if rest is None:
            return None
        rest.sort(key=lambda piece: section_of(piece).first)
        runs = sorted([(s.first, s.end) for s in sections] + [_run(piece) for piece in rest])
        ends = [0, *(end for _, end in runs)]
        if [first for first, _ in runs] != ends[:-1] or ends[-1] != y.shape[-1]:
            return None
        pieces += rest
    return tuple(pieces)


def _rest(
    tensor: gs.Variable, sections: Sequence[Section], taken: set[int], allowed: set[int]
) -> list[gs.Variable] | None:
    """The tensors that are cut out of ``tensor`` and hold nothing of the sections; None where others read it."""
    if id(tensor) in taken:
        return [] if all(id(node) in allowed for node in tensor.outputs) else None
    first, end = _run(tensor)
    if all(section.end <= first or end <= section.first for section in sections):
        return [tensor]
    found: list[gs.Variable] = []
    for node in tensor.outputs:
        for output in node.outputs:
            cut = cut_of(output)
            if cut is None or cut.whole is not tensor:
                return None
            part = _rest(output, sections, taken, allowed)
            if part is None:
                return None
            found += part
    return found


def _run(tensor: gs.Variable) -> tuple[int, int]:
    section = section_of(tensor)
    return section.first, section.end
