# SPDX-License-Identifier: Apache-2.0
"""Which run of another tensor's channels a tensor of a dense ONNX graph is: ``chunk``, ``split``, ``[..., a:b]``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Section:
    """Channels ``first`` to ``end`` of ``whole``; ``nodes``: what cuts them out, the last cut first."""

    whole: gs.Variable
    first: int
    end: int
    nodes: tuple[gs.Node, ...] = ()


def cut_of(tensor: gs.Variable) -> Section | None:
    """What ``tensor`` is directly cut out of; None where it is not, or where the graph does not tell its extents."""
    node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    channels = _channels(tensor)
    if node is None or channels is None or node.op not in ("Split", "Slice"):
        return None
    whole = node.inputs[0]
    whole_channels = _channels(whole) if isinstance(whole, gs.Variable) else None
    if whole_channels is None:
        return None
    first = _split_start(node, tensor) if node.op == "Split" else _slice_start(node, whole_channels, channels)
    if first is None or first + channels > whole_channels:
        return None
    return Section(whole, first, first + channels, (node,))


def section_of(tensor: gs.Variable) -> Section:
    """What ``tensor`` was cut out of, through all cuts; itself, whole, where there is none."""
    section = Section(tensor, 0, _channels(tensor) or 0)
    while (cut := cut_of(section.whole)) is not None:
        first = cut.first + section.first
        end = cut.first + section.end
        section = Section(cut.whole, first, end, (*section.nodes, *cut.nodes))
    return section


def _channels(tensor: gs.Tensor) -> int | None:
    extent = tensor.shape[-1] if tensor.shape else None
    return extent if isinstance(extent, int) else None


def _split_start(node: gs.Node, tensor: gs.Variable) -> int | None:
    if not _along_channels(node.attrs.get("axis", 0), tensor):
        return None
    before = [_channels(output) for output in node.outputs[: node.outputs.index(tensor)]]
    return None if None in before else sum(extent for extent in before if extent is not None)


def _slice_start(node: gs.Node, whole_channels: int, channels: int) -> int | None:
    """Of a Slice along the last axis alone, in steps of 1."""
    if not all(isinstance(operand, gs.Constant) for operand in node.inputs[1:]) or len(node.inputs) < 4:
        return None
    starts, _, axes, *steps = (np.ravel(operand.values).tolist() for operand in node.inputs[1:])
    if len(starts) != 1 or not _along_channels(axes[0], node.outputs[0]) or steps not in ([], [[1]]):
        return None
    start = int(starts[0]) + (whole_channels if starts[0] < 0 else 0)
    return start if 0 <= start <= whole_channels - channels else None


def _along_channels(axis: int, tensor: gs.Variable) -> bool:
    return axis in (-1, len(tensor.shape) - 1)
