# SPDX-License-Identifier: Apache-2.0
"""From recorded calls to what the manifest says of them."""

from __future__ import annotations

import logging

import pytest
import torch

from lynx_compile.engine.arguments import Parameter, Schema, TensorType
from lynx_compile.engine.manifest import Call, Fixed, Padding
from lynx_compile.engine.module import digest_of
from lynx_compile.models import recording
from lynx_compile.models.calls import recorded_call
from lynx_compile.models.recording import Axis, Component, Group
from lynx_compile.models.trace import Baked

RESULT = {"tuple": [{"tensor": "output.0"}]}
PARAMETERS = tuple(
    Parameter(name, "POSITIONAL_OR_KEYWORD", None) for name in ("x", "t", "text", "mask", "shape")
)
COMPONENT = Component("transformer", "diffusers.x:Model", {}, PARAMETERS)


def decided(*arguments: str, where: str = "model.py:7", places: bool = False) -> Baked:
    return Baked(arguments, where, places)


def group(*blobs: dict[str, str]) -> Group:
    tensors = {"x": TensorType("float32", 3), "t": TensorType("float32", 1), "text": TensorType("float32", 3),
               "mask": TensorType("int64", 2)}  # fmt: skip
    axes = (
        Axis("text", 1, 3, 9, "s0", "mask"),
        Axis("mask", 1, 3, 9, "s0", "mask"),
        Axis("x", 1, 4, 8, "s1", None),
    )
    calls = tuple(recording.Call("transformer", 0, i, i, "0", 0, blob) for i, blob in enumerate(blobs))
    schema = Schema(tensors, {"shape.0": 8, "return_dict": False})
    return Group("transformer", 0, schema, axes, calls, len(calls))


ARGUMENTS = {"x": torch.zeros(1, 4, 2), "t": torch.zeros(1), "text": torch.zeros(1, 9, 2),
             "mask": torch.ones(1, 9, dtype=torch.int64), "shape": [8]}  # fmt: skip
SAME = {"x": "1", "t": "1", "text": "1", "mask": "1"}


def described(decisions: list[Baked], *blobs: dict[str, str]) -> Call:
    return recorded_call(COMPONENT, group(*blobs), ARGUMENTS, RESULT, decisions)


def test_a_recorded_call() -> None:
    call = described([], SAME)
    assert (call.class_name, call.parameters) == ("diffusers.x:Model", PARAMETERS)
    assert call.tensors == {"x": "float32", "t": "float32", "text": "float32", "mask": "int64"}
    assert call.constants == {"shape.0": 8}, "the form of the result is not compared"
    assert call.padding == tuple(Padding(tensor=name, axis=1, mask="mask") for name in ("text", "mask"))
    assert (call.fixed, call.result) == ((), RESULT)


def test_masks_that_are_decided_on_are_fixed() -> None:
    """Also where recorded calls differ: only one of them can be right."""
    fixed = Fixed(tensor="mask", sha256=digest_of(ARGUMENTS["mask"]), where="model.py:7")  # type: ignore[arg-type]
    for other in (SAME, SAME | {"mask": "2"}):
        assert described([decided("mask"), decided("mask", where="model.py:9")], SAME, other).fixed == (
            fixed,
        )


def test_floating_tensors_are_fixed_where_they_never_change(caplog: pytest.LogCaptureFixture) -> None:
    decisions = [decided("t", "text")]
    assert [fixed.tensor for fixed in described(decisions, SAME, SAME | {"t": "2"}).fixed] == ["text"]
    assert "model.py:7 decides on the values of 't', which differ between calls" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        places = [decided("t", places=True)]
        assert [fixed.tensor for fixed in described(places, SAME, SAME | {"t": "2"}).fixed] == ["t"]
    assert not caplog.records


def test_digests_tell_dtype_shape_and_content() -> None:
    one = torch.tensor([[1.0, 2.0]])
    assert digest_of(one) == digest_of(one.clone()) == digest_of(torch.tensor([[1.0, 9.0, 2.0]])[:, ::2])
    others = [one.reshape(2, 1), one.double(), one + 1, torch.tensor([[1, 2]])]
    assert len({digest_of(one), *map(digest_of, others)}) == 5
    assert digest_of(torch.tensor(3.0)) == digest_of(torch.tensor([3.0]).expand(7)[0])
    assert digest_of(torch.ones(2, dtype=torch.bfloat16)) != digest_of(torch.ones(2, dtype=torch.float16))
