# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the pipeline of a class that has none here: it calls the tiny model, and gives what that gives."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from diffusers import DiffusionPipeline

from lynx_compile.tools.support import configurations
from lynx_compile.tools.support.pipelines import Prepared


class DirectCalls(DiffusionPipeline):
    """Two steps of one transformer, on given arguments."""

    calls: list[dict[str, Any]]

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    def __call__(self, first: int) -> list[Any]:
        """The results, from the call of that number on."""
        steps = (self.calls[first], self.calls[1 - first])
        return [self.transformer(**deepcopy(call)) for call in steps]  # a model may change its arguments


def prepare(name: str) -> Prepared:
    """The tiny configuration, called with its inputs and with others of the same shapes."""
    example = configurations.example(name)
    pipe = DirectCalls(example.module)
    pipe.calls = [example.inputs, example.second]
    return Prepared(pipe, [{"first": 0}, {"first": 1}], {})
