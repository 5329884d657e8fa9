# SPDX-License-Identifier: Apache-2.0
"""The cost table: exact where it was measured, between its neighbours in between, careful outside; or one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lynx_compile.errors import InputError
from lynx_compile.passes.speed_table import (
    FP8_WORKS,
    REACH,
    ROOFLINE_FP8_GAINS,
    ROOFLINE_GAIN,
    CostTable,
    Form,
    roofline,
)
from lynx_compile.recipe import NodeOperand
from lynx_compile.tools import bench
from tests.conftest import write_costs

BENCH = Path(__file__).parents[2] / "engines" / "bench"
WORKS: dict[NodeOperand, str] = {"none": "fp8_dense", "weight": "fp8_weight", "activation": "fp8_activation"}
GAINS = {
    (512, 3072, 9216): (0.92, 1.1),
    (4096, 3072, 9216): (1.39, 1.7),
    (4096, 3072, 3072): (1.13, 1.6),
    (4096, 12288, 3072): (1.27, 1.9),
    (8192, 3072, 9216): (1.5, 1.8),
}


@pytest.fixture
def table(tmp_path: Path) -> CostTable:
    return CostTable.load(write_costs(tmp_path / "gpu.json", GAINS, rank=64))


def test_measured_shapes_come_back_as_they_are(table: CostTable) -> None:
    assert table.name == "gpu.json"
    for sizes, (activation, weight) in GAINS.items():
        assert table.gain(*sizes, Form("activation"), 64) == activation
        assert table.gain(*sizes, Form("weight"), 64) == table.gain(*sizes, Form("weight"), 0) == weight


def test_it_reads_what_bench_saves(tmp_path: Path) -> None:
    shape = bench.SHAPES[0]
    result = bench._predict(shape, 16)
    path, _ = bench.save(bench.Bench("A GPU", "2", "bf16", False, (result,)), tmp_path)
    table = CostTable.load(path)
    sizes = (shape.tokens, shape.channels, shape.out_channels)
    assert table.gain(*sizes, Form("activation"), 16) == result.ratio.median
    assert table.gain(*sizes, Form("weight"), 16) == result.weight_ratio.median


def test_between_measured_shapes_it_is_linear_in_the_logarithms_and_monotonic(table: CostTable) -> None:
    middle = table.gain(2048, 3072, 9216, Form("weight"), 0)  # two thirds of the way from 512 to 4096
    others = CostTable(table.name, tuple(r for r in table.results if r.shape.out_channels == 9216))
    assert others.gain(2048, 3072, 9216, Form("weight"), 0) == pytest.approx(1.1 ** (1 / 3) * 1.7 ** (2 / 3))
    assert middle is not None and 1.1 < middle < 1.7
    gains = [others.gain(tokens, 3072, 9216, Form("activation"), 64) or 0 for tokens in range(512, 8193, 64)]
    assert all(a < b for a, b in pairwise(gains))
    assert (gains[0], gains[-1]) == (0.92, 1.5)


def test_in_between_no_gain_is_beyond_those_measured(table: CostTable) -> None:
    for tokens in (512, 1024, 3000, 8192):
        for channels in (3072, 5000, 12288):
            for out_channels in (3072, 4000, 9216):
                gain = table.gain(tokens, channels, out_channels, Form("activation"), 64)
                assert gain is not None and 0.92 <= gain <= 1.5


def test_outside_of_the_measured_range_the_lowest_neighbour_counts_and_far_outside_none(
    table: CostTable,
) -> None:
    assert table.gain(16384, 3072, 9216, Form("activation"), 64) == 1.5
    assert table.gain(16384, 3072, 5000, Form("activation"), 64) == 1.13
    assert table.gain(512 // REACH + 1, 3072, 9216, Form("activation"), 64) == 0.92
    assert table.gain(512 // REACH - 1, 3072, 9216, Form("activation"), 64) is None
    assert table.gain(4096, 12288 * REACH + 1, 9216, Form("weight"), 0) is None
    assert table.gain(8192 * REACH - 1, 3072, 9216, Form("weight"), 0) is not None


def test_of_a_shape_measured_twice_the_lower_gain_counts(tmp_path: Path) -> None:
    path = write_costs(tmp_path / "gpu.json", GAINS)
    values = json.loads(path.read_text())
    again = json.loads(json.dumps(values["results"][0]))
    again["weight_ratio"]["median"] = 1.05
    values["results"].append(again)
    path.write_text(json.dumps(values))
    assert CostTable.load(path).gain(512, 3072, 9216, Form("weight"), 0) == 1.05


def test_a_higher_rank_costs_what_the_roofline_says_and_a_lower_one_gains_nothing(table: CostTable) -> None:
    at = (4096, 3072, 9216)
    gains = [table.gain(*at, Form("activation"), rank) or 0 for rank in (0, 64, 128)]
    assert gains[0] == gains[1] == 1.39
    relative = roofline(*at, 128).gain(Form("activation")) / roofline(*at, 64).gain(Form("activation"))
    assert relative < 1 and gains[2] == pytest.approx(1.39 * relative)


def test_roofline() -> None:
    plain, ranked = roofline(4096, 3072, 9216, 0), roofline(4096, 3072, 9216, 64)
    assert plain.gain(Form("weight")) == ranked.gain(Form("weight")) == pytest.approx(ROOFLINE_GAIN)
    assert 1 < ranked.gain(Form("activation")) < plain.gain(Form("activation")) < ROOFLINE_GAIN
    assert roofline(4096, 3072, 64, 0).gain(Form("activation")) < 1, (
        "pruning costs more than so few outputs gain"
    )


def test_the_fp8_roofline_is_what_was_measured() -> None:
    """Its gains are the means of the summary, and at a measured shape its times are close to those measured."""
    measured = json.loads((BENCH / "summary.json").read_text())
    for operand, work in WORKS.items():
        assert ROOFLINE_FP8_GAINS[operand] == pytest.approx(measured[f"linears.{work}.gemm"], rel=0.05)
    for result in json.loads((BENCH / "nvidia-h200-fp8.json").read_text())["results"]:
        sizes = [result["shape"][name] for name in ("tokens", "channels", "out_channels")]
        if sizes[0] >= 4096:
            for operand, work in WORKS.items():
                predicted = roofline(*sizes, 0).gain(Form(operand, fp8=True))
                assert predicted == pytest.approx(result["ratios"][f"{work}.all"], rel=0.25)


def test_the_measured_fp8_file_is_a_table_of_the_forms_in_it() -> None:
    path = BENCH / "nvidia-h200-fp8.json"
    table, results = CostTable.load(path), json.loads(path.read_text())["results"]
    for result in results:
        sizes = [result["shape"][name] for name in ("tokens", "channels", "out_channels")]
        same = [
            other["ratios"]
            for other in results
            if [other["shape"][name] for name in ("tokens", "channels", "out_channels")] == sizes
        ]
        for form, work in FP8_WORKS.items():
            if form.fp8 or form == Form("weight") or work in result["ratios"]:
                assert table.gain(*sizes, form, 0) == min(ratios[work] for ratios in same)
            else:
                assert table.gain(*sizes, form, 0) is None, "it was not measured there"
    between = table.gain(4096, 3072, 6144, Form("weight", fp8=True), 0)
    assert between is not None and 1.8 < between < 2.7


def test_a_table_of_16_bits_says_nothing_of_fp8(table: CostTable) -> None:
    assert table.gain(4096, 3072, 9216, Form("weight", fp8=True), 0) is None
    assert table.gain(4096, 3072, 9216, Form("none", fp8=True), 0) is None


def test_words() -> None:
    assert [Form(*form).words for form in (("weight", True), ("activation", False), ("none", True), ("none",))] == [
        "2:4 weights in FP8", "2:4 activations", "dense FP8", "dense",
    ]  # fmt: skip


def _without(*keys: str | int) -> Callable[[Any], None]:
    def edit(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        del values[keys[-1]]

    return edit


def _with(value: Any, *keys: str | int) -> Callable[[Any], None]:
    def edit(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_without("results"), "'results' is wrong: Field required"),
        (_with([], "results"), "'results' is wrong"),
        (_with("many", "results"), "'results' is wrong"),
        (_without("results", 0, "shape"), "'results.0.shape' is wrong: Field required"),
        (_without("results", 1, "shape", "tokens"), "'results.1.shape.tokens' is wrong"),
        (_with(0, "results", 0, "shape", "channels"), "'results.0.shape.channels' is wrong"),
        (_with("64", "results", 0, "rank"), "'results.0.rank' is wrong"),
        (_with(1.39, "results", 0, "ratio"), "'results.0.ratio' is wrong"),  # the layout of earlier versions
        (_without("results", 0, "weight_ratio"), "'results.0.weight_ratio' is wrong: Field required"),
        (_with(0.0, "results", 0, "weight_ratio", "median"), "'results.0.weight_ratio.median' is wrong"),
        (_with({"fp8_weight.all": 0}, "results", 0, "ratios"), "'results.0.ratios.fp8_weight.all' is wrong"),
        (_with(float("nan"), "results", 0, "ratio", "median"), "is no cost table"),
    ],
)
def test_a_malformed_table_is_one_clear_error(
    tmp_path: Path, edit: Callable[[Any], None], message: str
) -> None:
    path = write_costs(tmp_path / "gpu.json", GAINS)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="gpu.json is no cost table.*lynx-compile bench") as caught:
        CostTable.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    whole = write_costs(tmp_path / "gpu.json", GAINS).read_bytes()
    (tmp_path / "cut.json").write_bytes(whole[:-100])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "huge.json").write_bytes(b" " * (17 << 20))
    for name, message in (
        ("none.json", "The cost table .*none.json does not exist. Correct sparsity.costs"),
        ("", "cannot be read"),
        ("cut.json", "is no cost table"),
        ("binary.json", "is no cost table"),
        ("list.json", "is no cost table"),
        ("deep.json", "is no cost table"),
        ("huge.json", "is larger than 16 MiB"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            CostTable.load(tmp_path / name)
        assert "\n" not in str(caught.value)
