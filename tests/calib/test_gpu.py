# SPDX-License-Identifier: Apache-2.0
"""What ``calib.digits_flux.gpu`` holds ops to, and that it sees one that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calib.digits_flux.gpu import OP_LIMIT, Found, held_to_definitions
from lynx_compile.torch_ops.definitions import definition
from tests.torch_ops.test_operators import MODULES, X


@pytest.mark.parametrize("name", list(MODULES))
def test_an_op_is_held_to_its_definition_in_float64(name: str) -> None:
    model = nn.ModuleDict({"op": MODULES[name]()})
    with held_to_definitions(model) as errors:
        model["op"](X)
    assert definition(model["op"], X).dtype == torch.float64
    assert 0 < errors["op"] < OP_LIMIT
    with held_to_definitions(model) as wrong:
        model["op"].rows = lambda x: type(model["op"]).rows(model["op"], x) * 1.1
        model["op"](X)
    assert wrong["op"] > 5 * OP_LIMIT


def test_an_op_that_does_not_run_is_no_success() -> None:
    name = next(iter(MODULES))
    with (
        pytest.raises(RuntimeError, match="op did not run"),
        held_to_definitions(nn.ModuleDict({"op": MODULES[name]()})),
    ):
        pass


def test_every_limit_is_said() -> None:
    good = Found("the CPU", "bfloat16", {"a": 1e-3}, 0.005, 0.005, 0.02, {"applied": 0.975})
    assert good.missed() == []
    bad = Found("the CPU", "bfloat16", {"a": float("nan")}, 0.5, 0.005, 0.02, {"applied": 0.5})
    assert len(bad.missed()) == 3
