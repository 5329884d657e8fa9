# SPDX-License-Identifier: Apache-2.0
"""``einsum`` of one or two tensors as a permutation or a matrix product: ONNX's Einsum knows no bfloat16.

einsum("nhwpqc->nchpwq", x)      ->  x.permute(...)
einsum("bnij,bhnkj->bhnki", a, b)  ->  matmul of [b n, i, j] and [b n, j, h k], permuted
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule


class Einsum(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is torch.einsum:
            equation, *operands = args
            if len(operands) == 1 and isinstance(operands[0], list | tuple):
                operands = list(operands[0])
            equation = _named(equation, operands)
            if equation is not None and _is_simple(equation, operands):
                return _einsum(equation, operands)
        return function(*args, **kwargs)


def _named(equation: Any, operands: Sequence[torch.Tensor]) -> str | None:
    """An equation without spaces, and with letters of their own for an ellipsis; None of one that names no result."""
    if not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    parts, longest = [], 0
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        ranks = operand.dim() - len(letters.replace("...", ""))
        longest = max(longest, ranks if "..." in letters else 0)
        # Dimensions of an ellipsis are counted from the last.
        parts.append(letters.replace("...", "".join(unused[:ranks][::-1])))
    return ",".join(parts) + "->" + output.replace("...", "".join(unused[:longest][::-1]))


def _is_simple(equation: str, operands: Sequence[torch.Tensor]) -> bool:
    """One or two tensors, no diagonal, no broadcast dimension."""
    if len(operands) > 2:
        return False
    inputs, output = equation.split("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        for letter, size in zip(letters, operand.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return False
    return all(len(set(letters)) == len(letters) for letters in [*inputs.split(","), output])


def _einsum(equation: str, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    inputs, output = equation.split("->")
    letters = inputs.split(",")
    if len(operands) == 2:  # torch multiplies tensors of two dtypes, where it sums nothing
        dtype = torch.promote_types(operands[0].dtype, operands[1].dtype)
        operands = [operand.to(dtype) for operand in operands]
    shared = set(letters[0]) & set(letters[-1]) if len(operands) == 2 else set()
    summed = [
        _summed(x, names, "".join(n for n in names if n in output or n in shared))
        for x, names in zip(operands, letters, strict=True)
    ]
    if len(operands) == 1:
        ((x, names),) = summed
        return x.permute([names.index(name) for name in output])
    (a, a_names), (b, b_names) = summed
    batch = [n for n in a_names if n in b_names and n in output]
    inner = [n for n in a_names if n in b_names and n not in output]
    rows, columns = ([n for n in names if n not in shared] for names in (a_names, b_names))
    size = {n: s for x, names in summed for n, s in zip(names, x.shape, strict=True)}
    product = torch.matmul(
        _matrices(a, a_names, batch, rows, inner, size), _matrices(b, b_names, batch, inner, columns, size)
    )
    found = [*batch, *rows, *columns]
    return product.reshape([size[n] for n in found]).permute([found.index(n) for n in output])


def _summed(x: torch.Tensor, names: str, kept: str) -> tuple[torch.Tensor, str]:
    """Without the dimensions that nobody else has."""
    gone = [i for i, name in enumerate(names) if name not in kept]
    return (x.sum(gone) if gone else x), kept


def _matrices(
    x: torch.Tensor,
    names: str,
    batch: list[str],
    rows: list[str],
    columns: list[str],
    size: Mapping[str, int],
) -> torch.Tensor:
    """[batch, rows, columns], each of them several dimensions, or none, in one."""
    ordered = x.permute([names.index(name) for name in (*batch, *rows, *columns)])
    return ordered.reshape([math.prod(size[n] for n in part) for part in (batch, rows, columns)])
