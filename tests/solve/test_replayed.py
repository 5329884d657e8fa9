# SPDX-License-Identifier: Apache-2.0
"""Gradients of a step where there is no GPU; tests/gpu has what a CUDA graph makes of them."""

from __future__ import annotations

import torch

from lynx_compile.solve.replayed import Gradients


def test_gradients_are_of_the_parts_of_one_step() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    gradients = Gradients(lambda x: (weight * x).sum(), [weight])
    for scale in (1.0, 2.0):
        parts = [("a", torch.full((3,), scale)), (None, torch.arange(3.0))]
        gradients.take(parts)
        assert weight.grad is not None
        assert weight.grad.tolist() == [scale, scale + 1, scale + 2]
