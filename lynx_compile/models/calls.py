# SPDX-License-Identifier: Apache-2.0
"""The call that an engine is compiled for, as its manifest has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lynx_compile.engine.arguments import Structure, bind, dtype_of, flatten, parameters
from lynx_compile.engine.manifest import Call, Padding


def call_of(
    class_name: str,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    result: Structure,
    padding: Sequence[Padding] = (),
) -> Call:
    """Describe a call of a module.

    Args:
        class_name: ``module:Class``.
        forward: of the class or its instance.
        arguments: of the call, by name; what it leaves out has its default.
        result: structure of what it returns with ``return_dict=True``, where it has that parameter; tensors are named
            as the graph's outputs.

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
        padding=tuple(padding),
        result=result,
    )
