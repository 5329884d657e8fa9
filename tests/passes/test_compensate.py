# SPDX-License-Identifier: Apache-2.0
"""The closed forms against brute force on the very samples that the moments came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lynx_compile.errors import StageError
from lynx_compile.files.progress import no_progress
from lynx_compile.models.structure import Linear
from lynx_compile.ops.fp8 import Rounded, fp8_linear, round_rows
from lynx_compile.ops.sparse_linear import collapse_low_rank, keep_mask, norm_scale_of, sparse_linear
from lynx_compile.passes import calibrate as calibrating
from lynx_compile.passes.calibrate import Unkept, are_kept, calibrate, measurements
from lynx_compile.passes.compensate import SparseLinearWeights, compensate, load_weights, solve
from lynx_compile.passes.compensate import _require_range as require_range
from lynx_compile.passes.compensate import save_weights as save
from lynx_compile.passes.select import SparseGroup, select
from lynx_compile.recipe import NodeOperand, Operand, Sparsity, load_recipe
from lynx_compile.solve.moments import Moments, PrunedStatistics
from tests.conftest import open_dit

K, N, TOKENS = 32, 48, 4000


def _group(operand: Operand = "activation") -> SparseGroup:
    linears = (Linear("a", K, 16, True, None), Linear("b", K, N - 16, True, None))
    return SparseGroup("a", linears, TOKENS, operand)


def _data(
    norm_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, PrunedStatistics]:
    torch.manual_seed(1)
    x = torch.randn(TOKENS, K) @ torch.randn(K, K) * 0.3 + torch.randn(K)
    weight, bias = torch.randn(N, K), torch.randn(N)
    keep = keep_mask(x)
    pruned = x * keep * (norm_scale_of(x, keep) if norm_scale else 1.0)
    moments = Moments(K, torch.device("cpu"), pruned=True)
    for part in range(0, TOKENS, 700):  # uneven batches
        moments.add(x[part : part + 700], pruned[part : part + 700])
    found = moments.finish()
    assert isinstance(found, PrunedStatistics)
    return x, pruned, weight, bias, found


def _output(solved: SparseLinearWeights, x: torch.Tensor) -> torch.Tensor:
    return sparse_linear(
        x, solved.weight, solved.lora_down, solved.bias, rank=solved.rank, norm_scale=solved.norm_scale
    )


def _loss(solved: SparseLinearWeights, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((_output(solved, x) - y).square().mean())


def _measured(solved: SparseLinearWeights, y: torch.Tensor, y_dense: torch.Tensor) -> tuple[float, ...]:
    """|y - y_dense| / |y_dense| of each linear."""
    pairs = zip(*(tensor.split(solved.out_channels, dim=-1) for tensor in (y, y_dense)), strict=True)
    return tuple(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_moments_are_the_covariances() -> None:
    x, pruned, *_, moments = _data(norm_scale=False)
    both = torch.cat((x, pruned), 1).double()
    cov = torch.cov(both.T, correction=0)
    assert moments.tokens == TOKENS
    assert torch.allclose(torch.cat((moments.x_mean, moments.s_mean)).double(), both.mean(0), atol=1e-5)
    for got, want in ((moments.xx, cov[:K, :K]), (moments.xs, cov[:K, K:]), (moments.ss, cov[K:, K:])):
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)


def test_magnitude_needs_no_calibration(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is run, and no module loaded: weights come from the checkpoint, and stay in the recipe's dtype."""
    recipe = load_recipe(tiny / "tiny.yaml").model_copy(
        update={"sparsity": Sparsity(method="magnitude", operand="weight")}
    )
    dit, recording = open_dit(recipe)
    monkeypatch.setattr(type(dit), "module", property(lambda self: pytest.fail("the module was loaded")))
    plan = select(dit.groups, recipe.sparsity)
    statistics = calibrate(dit, plan, recording, recipe, tmp_path / "statistics", no_progress)
    paths = compensate(dit, plan, statistics, recipe.sparsity, tmp_path / "weights", no_progress)
    solved = load_weights(paths[0])
    weight = torch.cat([dit.checkpoint.tensor(f"{path}.weight") for path in solved.linears])
    kept = torch.where(keep_mask(weight), weight, 0.0)
    assert torch.equal(solved.weight, kept.half().float())
    first = solved.out_channels[0]
    lost = (weight - kept)[:first].norm() / weight[:first].norm()
    assert solved.errors[0] == pytest.approx(float(lost), rel=1e-4)
    assert load_file(paths[0])["weight"].dtype == torch.float16


@pytest.mark.parametrize("memory_gib", [0.002, 0.0003], ids=["block by block", "in passes"])
def test_moments_too_large_to_keep_give_the_same_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_gib: float
) -> None:
    """Nothing of them is on the disk, and a run that was stopped goes on at the block that was not solved."""
    sparsity = Sparsity(operand={"*.to_q": "weight", "*": "activation"})
    recipe = load_recipe(tiny / "tiny.yaml").model_copy(update={"sparsity": sparsity})
    dit, recording = open_dit(recipe)
    plan = select(dit.groups, sparsity)
    kept = calibrate(dit, plan, recording, recipe, tmp_path / "statistics", no_progress)
    expected = compensate(dit, plan, kept, sparsity, tmp_path / "kept", no_progress)
    less = recipe.calibration.model_copy(update={"memory_gib": memory_gib})
    recipe = recipe.model_copy(update={"calibration": less})
    assert not are_kept(plan, recipe)
    unkept, folder, measured = Unkept(dit, plan, recording, recipe), tmp_path / "unkept", []
    hooks = calibrating._measured
    monkeypatch.setattr(
        calibrating,
        "_measured",
        lambda module, wanted, *a: (measured.extend(wanted), hooks(module, wanted, *a))[1],
    )

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("linears compensated", total - 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compensate(dit, plan, unkept, sparsity, folder, stop, "key")
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(measured) == len({one.name for one in measured})
    measured.clear()
    found = compensate(dit, plan, unkept, sparsity, folder, no_progress, "key")
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]
    assert len(first) == len(found) - 1 and all(path.stat().st_mtime_ns == t for path, t in first.items())
    assert 0 < len(measured) < len(measurements(plan)) / 2, "the last block or pass alone"
    assert sorted(folder.iterdir()) == sorted(found)


def test_refit_alone_is_the_least_squares_fit() -> None:
    x, pruned, weight, bias, moments = _data(norm_scale=False)
    solved = solve(_group(), weight, bias, moments, Sparsity(rank=0, ridge=1e-9))
    design = torch.cat((pruned, torch.ones(TOKENS, 1)), 1).double()
    target = (x @ weight.T + bias).double()
    best = torch.linalg.lstsq(design, target).solution
    assert torch.allclose(solved.weight[:, :K].double(), best[:K].T, atol=1e-3)
    assert torch.allclose(solved.bias.double(), best[K], atol=1e-3)
    assert solved.rank == 0 and solved.lora_down.shape == (1, K)


@pytest.mark.parametrize("norm_scale", [False, True])
def test_joint_is_a_stationary_point_and_beats_gradient_descent(norm_scale: bool) -> None:
    """No nearby A, B, W', b is better, and 300 steps of Adam from the solution gain next to nothing."""
    x, _, weight, bias, moments = _data(norm_scale)
    y = x @ weight.T + bias
    solved = solve(_group(), weight, bias, moments, Sparsity(rank=16, ridge=1e-9, norm_scale=norm_scale))
    start = _loss(solved, x, y)
    keep = keep_mask(x)
    pruned = x * keep * (norm_scale_of(x, keep) if norm_scale else 1.0)
    parameters = [
        t.clone().requires_grad_()
        for t in (
            solved.weight[:, :K],
            solved.lora_down,
            collapse_low_rank(solved.weight, K, 16),
            solved.bias,
        )
    ]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(300):
        refit, down, up, b = parameters
        loss = (pruned @ refit.T + (x @ down.T) @ up.T + b - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert start <= float(loss.detach()) * 1.01


def test_paper_keeps_the_weights_and_fits_the_best_low_rank() -> None:
    x, pruned, weight, bias, moments = _data(norm_scale=True)
    y = x @ weight.T + bias
    solved = solve(_group(), weight, bias, moments, Sparsity(method="paper", rank=16, ridge=1e-9))
    assert solved.norm_scale
    assert torch.equal(solved.weight[:, :K], weight) and torch.equal(solved.bias, bias)
    # Reduced-rank regression of the residual on x, solved another way: SVD of the fitted values.
    residual = y - pruned @ weight.T - bias
    fitted = x @ torch.linalg.lstsq(x, residual).solution
    left, values, right = torch.linalg.svd(fitted, full_matrices=False)
    best = (residual - left[:, :16] * values[:16] @ right[:16]).square().mean()
    assert _loss(solved, x, y) == pytest.approx(float(best), rel=1e-3)


def test_order_of_merit() -> None:
    x, _, weight, bias, moments = _data(norm_scale=False)
    y = x @ weight.T + bias
    naive, refit, joint = (
        _loss(solve(_group(), weight, bias, moments, sparsity), x, y)
        for sparsity in (Sparsity(method="none"), Sparsity(rank=0), Sparsity(rank=16))
    )
    assert joint < refit < naive


@pytest.mark.parametrize("method", ["joint", "paper", "none"])
def test_the_expected_error_is_the_measured_one(method: str) -> None:
    sparsity = Sparsity(method=method)  # type: ignore[arg-type]
    x, _, weight, bias, moments = _data(sparsity.uses_norm_scale)
    y = x @ weight.T + bias
    solved = solve(_group(), weight, bias, moments, sparsity)
    assert solved.errors == pytest.approx(_measured(solved, _output(solved, x), y), rel=1e-3)


def test_weights_survive_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, _, weight, bias, moments = _data(norm_scale=False)
    solved = solve(_group(), weight, bias, moments, Sparsity())
    save(tmp_path / "w.safetensors", solved)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(loaded.weight, solved.weight) and loaded.linears == ("a", "b")
    assert (loaded.rank, loaded.out_channels, loaded.errors) == (solved.rank, (16, 32), solved.errors)
    assert loaded.operand == "activation" and loaded.solved_errors is None
    save(tmp_path / "w.safetensors", replace(solved, solved_errors=(0.1, 0.2)))
    assert load_weights(tmp_path / "w.safetensors").solved_errors == (0.1, 0.2)
    pruned = solve(_group("weight"), weight, bias, moments, Sparsity())
    save(tmp_path / "w.safetensors", pruned)
    assert load_weights(tmp_path / "w.safetensors").operand == "weight"
    assert not load_weights(tmp_path / "w.safetensors").fp8


@pytest.mark.parametrize("operand", ["none", "weight", "activation"])
def test_fp8_weights_survive_the_disk_as_they_were_rounded(tmp_path: Path, operand: NodeOperand) -> None:
    _, _, weight, bias, _ = _data(norm_scale=False)
    rounded = round_rows(weight, keep_mask(weight) if operand == "weight" else None)
    solved = SparseLinearWeights(
        ("a", "b"),
        (16, 32),
        rounded.values,
        torch.zeros(1, K),
        bias,
        0,
        False,
        (0.1, 0.2),
        operand,
        rounded.scale,
    )
    save(tmp_path / "w.safetensors", solved)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.fp8 and loaded.operand == operand and loaded.in_channels == K
    assert loaded.weight.dtype == torch.float8_e4m3fn and loaded.weight_scale is not None
    assert torch.equal(loaded.weight.view(torch.uint8), rounded.values.view(torch.uint8))
    assert torch.equal(loaded.weight_scale, rounded.scale)


def _fp8_moments(x: torch.Tensor) -> PrunedStatistics:
    moments = Moments(K, torch.device("cpu"), pruned=True, rounded=True)
    for part in range(0, len(x), 700):
        batch = x[part : part + 700]
        keep, error = keep_mask(batch), round_rows(batch).dequantized() - batch
        moments.add(batch, batch * keep, [error, error * keep])
    found = moments.finish()
    assert isinstance(found, PrunedStatistics)
    return found


@pytest.mark.parametrize("method", ["joint", "none"])
@pytest.mark.parametrize("operand", ["none", "weight", "activation"])
def test_fp8_expected_error_is_that_of_the_op(operand: NodeOperand, method: str) -> None:
    """Of the op itself, which rounds x too: on the calibration's tokens, and on others of their kind."""
    x, _, weight, bias, _ = _data(norm_scale=False)
    half = TOKENS // 2
    group = SparseGroup("a", _group().linears, TOKENS, operand, fp8=True)
    sparsity = Sparsity(method=method, precision="fp8")  # type: ignore[arg-type]
    solved = solve(group, weight, bias, _fp8_moments(x[:half]), sparsity)
    assert solved.weight_scale is not None and solved.weight.dtype == torch.float8_e4m3fn and not solved.rank
    rounded = Rounded(solved.weight, solved.weight_scale)
    y = x @ weight.T + bias
    got = fp8_linear(x, rounded, solved.bias, prune=operand == "activation")
    ends = ((slice(0, half), 0.02), (slice(half, None), 0.1))
    for rows, tolerance in ends:
        assert solved.errors == pytest.approx(_measured(solved, got[rows], y[rows]), rel=tolerance)
    kept = solved.weight.float().ne(0).unflatten(-1, (-1, 4)).sum(-1)
    assert kept.max() == (2 if operand == "weight" else 4)


@pytest.mark.parametrize("operand", ["none", "weight", "activation"])
def test_fp8_costs_little_beyond_what_16_bits_cost(operand: NodeOperand) -> None:
    x, _, weight, bias, _ = _data(norm_scale=False)
    moments = _fp8_moments(x)
    group = SparseGroup("a", _group().linears, TOKENS, operand, fp8=True)
    fed = solve(group, weight, bias, moments, Sparsity(rank=0))
    in_16_bits = (0.0, 0.0)
    if operand != "none":
        in_16_bits = solve(_group(operand), weight, bias, moments, Sparsity(rank=0)).errors
        assert max(fed.errors) < 1.1 * max(in_16_bits), "rounding adds like an independent error"
    assert all(a > b for a, b in zip(fed.errors, in_16_bits, strict=True)), (
        "x's rounding alone costs something"
    )
    plain = solve(group, weight, bias, moments, Sparsity(method="none"))
    assert all(a < b for a, b in zip(fed.errors, plain.errors, strict=True))


def test_fp8_without_the_measured_rounding_of_x_is_refused() -> None:
    _, _, weight, bias, moments = _data(norm_scale=False)
    group = SparseGroup("a", _group().linears, TOKENS, "none", fp8=True)
    with pytest.raises(AssertionError, match="calibrate measures it"):
        solve(group, weight, bias, moments, Sparsity())


@pytest.mark.parametrize("method", ["joint", "none"])
def test_weights_expected_error_is_the_measured_one(method: str) -> None:
    x, _, weight, bias, moments = _data(norm_scale=False)
    y = x @ weight.T + bias
    solved = solve(_group("weight"), weight, bias, moments, Sparsity(method=method, operand="weight"))  # type: ignore[arg-type]
    got = x @ solved.weight.T + solved.bias
    assert solved.errors == pytest.approx(_measured(solved, got, y), rel=1e-3)
    assert (solved.operand, solved.rank, solved.norm_scale, solved.in_channels) == ("weight", 0, False, K)


def test_pruned_weights_are_repaired_by_joint_and_only_masked_by_none() -> None:
    _, _, weight, bias, moments = _data(norm_scale=False)
    joint, none = (
        solve(_group("weight"), weight, bias, moments, Sparsity(method=method, operand="weight"))
        for method in ("joint", "none")
    )
    assert all(a < 0.8 * b for a, b in zip(joint.errors, none.errors, strict=True))
    assert torch.equal(none.weight[none.weight != 0], weight[none.weight != 0])
    assert torch.equal(none.bias, bias) and not torch.equal(joint.bias, bias)
    for solved in (joint, none):
        assert solved.weight.ne(0).unflatten(-1, (-1, 4)).sum(-1).eq(2).all()


def test_moments_of_x_alone_are_those_that_come_with_the_pruned_ones() -> None:
    x, *_, pruned = _data(norm_scale=False)
    moments = Moments(K, torch.device("cpu"), pruned=False)
    for part in range(0, TOKENS, 700):
        moments.add(x[part : part + 700])
    assert len(moments.scatter) == 1
    alone = moments.finish()
    assert not isinstance(alone, PrunedStatistics) and not moments.scatter, "what is finished is held once"
    assert torch.equal(alone.xx, pruned.xx) and torch.equal(alone.x_mean, pruned.x_mean)


@pytest.mark.parametrize(("row", "linear"), [(3, "a"), (40, "b")])
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_weight_that_its_dtype_cannot_hold_names_its_linear(row: int, linear: str, tensor: str) -> None:
    _, _, weight, bias, moments = _data(norm_scale=False)
    solved = solve(_group("weight"), weight, bias, moments, Sparsity())
    require_range(solved, torch.float16)
    spoiled = getattr(solved, tensor)
    spoiled.view(N, -1)[row, 0] = -1e5
    require_range(solved, torch.bfloat16)
    message = (
        rf"weight of '{linear}' is 1e\+05 now, more than float16 holds \(6.55e\+04\).*model.dtype to bf16"
    )
    with pytest.raises(StageError, match=message):
        require_range(solved, torch.float16)
