# SPDX-License-Identifier: Apache-2.0
"""The call that an engine is compiled for, as its manifest has it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lynx_compile.engine.arguments import Structure, bind, dtype_of, flatten, parameters
from lynx_compile.engine.manifest import Call, Fixed, Padding
from lynx_compile.engine.module import digest_of
from lynx_compile.models.recording import Component, Group
from lynx_compile.models.trace import Baked

log = logging.getLogger(__name__)


def recorded_call(
    component: Component,
    group: Group,
    arguments: Mapping[str, Any],
    result: Structure,
    baked: Sequence[Baked] = (),
) -> Call:
    """Describe the calls that one graph serves.

    Args:
        arguments: of ``forward``, nested, as the graph was traced with them.
        result: structure of what it returned, with ``return_dict=True`` where it has that parameter; tensors are named
            as the graph's outputs.
        baked: what of ``arguments`` tracing has made constant. Every call must repeat what they depend
            on: masks, ids and lengths, and floating tensors that no recorded call has otherwise. Others the user is
            told of: whether a call with another value decides alike is not known.
    """
    return Call(
        class_name=component.class_name,
        parameters=component.parameters,
        tensors={name: kind.dtype for name, kind in group.schema.tensors.items()},
        constants={name: value for name, value in group.schema.constants.items() if name != "return_dict"},
        padding=tuple(Padding(tensor=a.tensor, axis=a.axis, mask=a.mask) for a in group.axes if a.mask),
        fixed=tuple(_fixed(group, flatten(arguments).tensors, baked)),
        result=result,
        returns=component.returns,
    )


def call_of(
    class_name: str, forward: Callable[..., Any], arguments: Mapping[str, Any], result: Structure
) -> Call:
    """Describe one call of a module, of which no recording is at hand.

    Args:
        class_name: ``module:Class``.
        forward: of the class or its instance.
        arguments: of the call, by name; what it leaves out has its default.
        result: as for ``recorded_call``.

    Raises:
        InputError: the arguments are not those of ``forward``, or hold what is neither a tensor nor a constant.
    """
    known = parameters(forward)
    bound = bind(known, (), arguments)
    bound.pop("return_dict", None)
    flat = flatten(bound)
    return Call(
        class_name=class_name,
        parameters=known,
        tensors={name: dtype_of(tensor) for name, tensor in flat.tensors.items()},
        constants=flat.constants,
        padding=(),
        fixed=(),
        result=result,
    )


def _fixed(group: Group, tensors: Mapping[str, torch.Tensor], baked: Sequence[Baked]) -> Iterator[Fixed]:
    found: dict[str, Baked] = {}
    for decision in baked:
        for name in decision.arguments:
            found.setdefault(name, decision)
    for name, decision in found.items():
        varies = len({call.blobs[name] for call in group.calls}) > 1
        if varies and tensors[name].is_floating_point() and not decision.places:
            log.warning(
                "%s decides on the values of '%s', which differ between calls: the engine has the decision of the "
                "first call. Compare it with the model.",
                decision.where,
                name,
            )
        else:
            yield Fixed(tensor=name, sha256=digest_of(tensors[name]), where=decision.where)
