# SPDX-License-Identifier: Apache-2.0
"""What a form of a model is held to before it is timed: every product, and every kind of block once it is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lynx_compile.errors import StageError
from lynx_compile.ops.fp8 import Rounded, round_rows
from lynx_compile.tools.model_forms import DenseLinear, Mixed, TorchFp8Linear
from lynx_compile.torch_ops.definitions import COMPILED, definition
from lynx_compile.torch_ops.readers import Merged

CHECKED_ROWS = 64
TOLERANCE = (
    2.0**-7
)  # of an op against float64 on its own operands: y's rounding to bf16, and the tensor cores' sums
# Of what a compiled block adds, against the block in eager mode: a compiler rounds less often in between; where x is
# rounded to e4m3 behind that, a last bit more or less of bf16 becomes one of e4m3.
BLOCK_TOLERANCE = {"bf16_dense": 2.0**-5, "bf16_weight": 2.0**-5}
FP8_BLOCK_TOLERANCE = 2.0**-3


def check_ops(
    form: str, module: nn.Module, calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
) -> tuple[dict[str, torch.Tensor], float | None]:
    """What the first block of each kind gives in eager mode, and the largest error of a product in it.

    Raises:
        StageError: one exceeds what rounding explains.
    """
    outputs, errors = {}, []
    for path, (args, kwargs) in calls.items():
        block = module.get_submodule(path)
        seen: list[tuple[nn.Module, torch.Tensor, list[torch.Tensor]]] = []
        with _recorded(block, seen):
            outputs[path] = _joined(block(*args, **kwargs))
        for linear, x, parts in seen:
            if isinstance(linear, DenseLinear) and not isinstance(linear, TorchFp8Linear):
                continue  # cuBLAS
            rows = torch.linspace(0, len(x) - 1, min(CHECKED_ROWS, len(x)), device=x.device).long()
            wanted = _definition(linear, x[rows])
            found = torch.cat([part.flatten(0, -2) for part in parts], -1)[rows].double()
            errors.append(float((found - wanted).norm() / wanted.norm()))
            if not errors[-1] < TOLERANCE:
                raise StageError(
                    "bench",
                    f"{form}, {path}: a product of {tuple(x.shape)} is off by {errors[-1]:.2e} of its norm.",
                    "Do not use this build on this GPU; please report it with the GPU's name.",
                )
    return outputs, max(errors, default=None)


@contextlib.contextmanager
def _recorded(
    block: nn.Module, seen: list[tuple[nn.Module, torch.Tensor, list[torch.Tensor]]]
) -> Iterator[None]:
    """Every product in ``block``: its module, x [M, K], and the parts of its result."""
    products = {
        id(each): each
        for merged in block.modules()
        if isinstance(merged, Merged)
        for each in _products(merged)
    }
    for linear in products.values():

        def parts(x: torch.Tensor, sizes: list[int], linear: Any = linear) -> list[torch.Tensor]:
            found: list[torch.Tensor] = type(linear).parts(linear, x, sizes)
            seen.append((linear, x.reshape(-1, x.shape[-1]), found))
            return found

        linear.parts = parts
    try:
        yield
    finally:
        for linear in products.values():
            del linear.__dict__["parts"]


def _products(merged: Merged) -> list[Any]:
    linear: Any = merged.linear
    return list(linear.products) if isinstance(linear, Mixed) else [linear]


def _definition(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """The product of some rows in float64, by what the module holds."""
    if isinstance(linear, COMPILED):
        return definition(linear, x)
    weight = Rounded(linear.weight, linear.weight_scale).dequantized(torch.float64)
    y = round_rows(x).dequantized(torch.float64) @ weight.T
    y = y if linear.bias is None else y + linear.bias.double()
    plain, behind = y.tensor_split((linear.group.gelu_from,), 1)
    return torch.cat((plain, functional.gelu(behind, approximate="tanh")), 1)


def check_blocks(
    form: str,
    module: nn.Module,
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]],
    eager: dict[str, torch.Tensor],
) -> float:
    """The largest relative difference of what a compiled block adds from what it adds in eager mode.

    Raises:
        StageError: it exceeds what rounding explains.
    """
    errors = []
    for path, (args, kwargs) in calls.items():
        found = _joined(module.get_submodule(path)(*args, **kwargs))
        added = eager[path] - _residual(args, kwargs, eager[path])
        errors.append(float((found - eager[path]).norm() / added.norm()))
        if not errors[-1] < BLOCK_TOLERANCE.get(form, FP8_BLOCK_TOLERANCE):
            raise StageError(
                "bench",
                f"{form}, {path}: compiled, it differs by {errors[-1]:.2e} of what it adds.",
                "Do not use this build on this GPU; please report it with the GPU's name.",
            )
    return max(errors)


def _joined(output: Any) -> torch.Tensor:
    """All tensors of a block's result, one behind the other."""
    tensors = (
        [output] if isinstance(output, torch.Tensor) else [t for t in output if isinstance(t, torch.Tensor)]
    )
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """What a block adds to: its inputs of that many values, in the order of its results."""
    names = [
        kwargs[name] for name in ("encoder_hidden_states", "hidden_states") if kwargs.get(name) is not None
    ]
    inputs = names or [next(t for t in args if isinstance(t, torch.Tensor))]
    joined = _joined(inputs)
    return joined if joined.shape == output.shape else torch.zeros_like(output)
