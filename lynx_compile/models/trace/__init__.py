# SPDX-License-Identifier: Apache-2.0
"""General rules that make a module exportable: each rewrites, while the module is traced, one thing that ONNX lacks.

A rule sees every call of torch that the module makes (a ``Rule``) or changes the module beforehand.
None names a class of model: what only one class needs is in ``models/families``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lynx_compile.models import families
from lynx_compile.models.trace.attributes import attributes_kept
from lynx_compile.models.trace.bool_fill import BoolFill
from lynx_compile.models.trace.broadcast_copy import BroadcastCopy
from lynx_compile.models.trace.complex_pairs import ComplexPairs, complex_buffers_as_constants
from lynx_compile.models.trace.conv_transpose import ConvTranspose
from lynx_compile.models.trace.data_alias import DataAlias
from lynx_compile.models.trace.einsum import Einsum
from lynx_compile.models.trace.flex_attention import dense_flex_attention
from lynx_compile.models.trace.lengths import lengths_as_sizes
from lynx_compile.models.trace.live_masks import LiveMasks
from lynx_compile.models.trace.many_dimensions import ManyDimensions
from lynx_compile.models.trace.masked_rows import MaskedRows
from lynx_compile.models.trace.narrow_integers import NarrowIntegers
from lynx_compile.models.trace.no_keys import NoKeys
from lynx_compile.models.trace.onnx_branches import no_onnx_branches
from lynx_compile.models.trace.scatter_add import ScatterAdd
from lynx_compile.models.trace.sorts import Sorts
from lynx_compile.models.trace.squeeze import CheckedSqueeze
from lynx_compile.models.trace.stacks import Stacks
from lynx_compile.models.trace.values import Baked, Values

__all__ = ["Baked", "exportable"]

# The last sees a call first. After them come those that follow the calls as the module wrote them.
RULES = (
    CheckedSqueeze, ManyDimensions, Stacks, NarrowIntegers, Einsum, ConvTranspose, BoolFill, Sorts, BroadcastCopy,
    DataAlias, MaskedRows, NoKeys, ComplexPairs,
)  # fmt: skip


@contextmanager
def exportable(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Iterator[list[Baked]]:
    """While this is open, ``module.forward`` can be traced by ``torch.export`` (not strict).

    Args:
        module: its ``forward`` takes the tensors of ``example`` by position.
        example: the tensors it will be traced with, by the names of the arguments; where Python asks for a value
            that depends on nothing else, it gets this one's.

    Yields:
        What tracing made constant, filled while it runs.
    """
    baked: list[Baked] = []
    original = module.forward
    buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_complex()}
    weights = dict(module.named_parameters())

    def forward(*arguments: torch.Tensor) -> Any:
        values = Values(baked)
        for traced, (name, tensor) in zip(arguments, example.items(), strict=True):
            values.know(traced, tensor, {name})
        for name, buffer in module.named_buffers():
            if name in buffers:
                values.know(buffer, buffers[name], set())
        for name, parameter in module.named_parameters():
            values.know_weight(parameter, weights[name])
        with ExitStack() as stack:
            for rule in RULES:
                stack.enter_context(rule())
            stack.enter_context(values)
            stack.enter_context(LiveMasks(values))
            stack.enter_context(ScatterAdd(values))
            return original(*arguments)

    forward.__signature__ = original.__signature__  # type: ignore[attr-defined]
    with ExitStack() as stack:
        stack.enter_context(attributes_kept(module))
        stack.enter_context(complex_buffers_as_constants(module))
        stack.enter_context(dense_flex_attention())
        stack.enter_context(no_onnx_branches())
        stack.enter_context(lengths_as_sizes(module))
        families.prepare(module)
        module.forward = forward
        yield baked
