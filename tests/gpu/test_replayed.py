# SPDX-License-Identifier: Apache-2.0
"""Loops over columns as CUDA graphs: the bits that they have when Python launches every kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from lynx_compile.ops.fp8 import round_rows
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.solve import replayed, rounding, weight_refit
from lynx_compile.solve.tune import Rows, TunedLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OUT, CHANNELS = 96, 272  # blocks of 128 columns, and one of 16


@pytest.fixture
def problem() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(4 * CHANNELS, CHANNELS, device="cuda") * torch.rand(CHANNELS, device="cuda")
    yield torch.randn(OUT, CHANNELS, device="cuda"), x.T @ x / len(x)
    replayed.forget()


def test_a_sweep_is_the_same(
    problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, covariance = problem
    found = [weight_refit.sweep(weight * scale, covariance, 1e-3, "node") for scale in (1.0, 2.0, 1.0)]
    monkeypatch.setattr(weight_refit, "replayed", _launched)
    assert torch.equal(found[0], weight_refit.sweep(weight, covariance, 1e-3, "node"))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_rounding_is_the_same(
    problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, covariance = problem
    start = weight_refit.sweep(weight, covariance, 1e-3, "node")
    found = rounding.round_weights(start, weight, covariance, 1e-3)
    monkeypatch.setattr(rounding, "replayed", _launched)
    wanted = rounding.round_weights(start, weight, covariance, 1e-3)
    assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("fp8", [False, True])
def test_gradients_are_the_same(fp8: bool) -> None:
    found = []
    for record in (True, False):
        torch.manual_seed(0)
        weights = [torch.randn(96, 64, device="cuda"), torch.randn(64, 96, device="cuda")]
        linears = [TunedLinear(_rows(weight, fp8)).cuda() for weight in weights]
        for linear in linears:
            linear.rounds_activations = False
        parameters = [p for linear in linears for p in linear.parameters()]

        def loss(
            part: tuple[torch.Tensor, torch.Tensor], linears: list[TunedLinear] = linears
        ) -> torch.Tensor:
            x, wanted = part
            x.mul_(0.5)  # as a module may
            y = linears[1](torch.nn.functional.gelu(linears[0](x)))
            return (y - wanted).square().sum()

        gradients = replayed.Gradients(loss, parameters)
        gradients._records &= record
        steps = []
        for _ in range(8):
            parts = [("a", _part(32)), ("b", _part(16)), (None, _part(8)), ("a", _part(32))]
            gradients.take(parts)
            steps.append([p.grad.clone() for p in parameters if p.grad is not None])
        assert bool(gradients._recorded) == record
        found.append(steps)
    for one, other in zip(*found, strict=True):
        assert len(one) == len(other) > 2
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_what_is_no_tensor_is_not_replayed_for_another() -> None:
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
    gradients = replayed.Gradients(lambda part: (weight * part[0]).sum() * part[1], [weight])
    ones = torch.ones(4, device="cuda")
    for step in range(12):
        gradients.take([("a", (ones, 2 + step % 2))])
        assert weight.grad is not None and weight.grad.tolist() == 4 * [2 + step % 2]
    assert len(gradients._recorded) == 2


@pytest.mark.parametrize("waits", ["said before", "found by the graph"])
def test_what_waits_for_the_gpu_is_launched_as_before(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if waits == "found by the graph":
        monkeypatch.setattr(replayed, "_refused_to_wait", nullcontext)
    linear = torch.nn.Linear(64, 64).cuda()
    gradients = replayed.Gradients(
        lambda x: linear(x).square().sum() * float(x.abs().max() > 0), list(linear.parameters())
    )
    for _ in range(8):
        x = torch.randn(16, 64, device="cuda")  # fails after a graph that ended early, if nothing mends that
        gradients.take([("a", x)])
        assert linear.bias.grad is not None
        assert torch.allclose(linear.bias.grad, 2 * linear(x).detach().sum(0), rtol=1e-4, atol=1e-3)
    assert not gradients._recorded
    assert torch.cuda.get_sync_debug_mode() == 0


def _part(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 64, device="cuda"), torch.randn(rows, 64, device="cuda")


def _rows(weight: torch.Tensor, fp8: bool) -> Rows:
    pruned = weight * keep_mask(weight)
    bias = torch.zeros(len(weight), device="cuda")
    if not fp8:
        return Rows(pruned, bias, "weight")
    rounded = round_rows(pruned)
    return Rows(rounded.values, bias, "weight", weight_scale=rounded.scale)


def _launched(loop: replayed.Loop, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return loop(*(tensor.clone() for tensor in given))
