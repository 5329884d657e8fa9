# SPDX-License-Identifier: Apache-2.0
"""Speed decides the operand, and what would be slower stays dense, with the reason; globs have the last word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lynx_compile.errors import InputError
from lynx_compile.models.structure import Linear, LinearGroup
from lynx_compile.passes.select import BY_ERROR, FP8_CHANNELS, Decision, select
from lynx_compile.passes.speed_table import Form, roofline
from lynx_compile.recipe import Sparsity
from tests.conftest import tiny_groups, write_costs

# Every shape of the tiny model: 128 image tokens, 8 text tokens, both in the single block.
TEXT = {
    (8, 64, 192): (0.92, 0.95),
    (8, 64, 64): (0.8, 0.7),
    (8, 64, 256): (0.9, 0.99),
    (8, 256, 64): (0.5, 0.6),
}
IMAGE = {
    (128, 64, 192): (1.4, 1.7),
    (128, 64, 64): (1.1, 1.6),
    (128, 64, 256): (1.5, 1.2),
    (128, 256, 64): (1.3, 1.9),
}
SINGLE = {(136, 64, 448): (1.4, 1.8), (136, 320, 64): (0.9, 1.2)}


@pytest.fixture
def costs(tmp_path: Path) -> str:
    return str(write_costs(tmp_path / "gpu.json", TEXT | IMAGE | SINGLE))


def _decisions(sparsity: Sparsity) -> dict[str, Decision]:
    return {decision.linear.path: decision for decision in select(tiny_groups(), sparsity).decisions}


def test_slow_text_linears_stay_dense_and_the_faster_operand_wins(costs: str) -> None:
    decisions = _decisions(Sparsity(costs=costs))
    block = "transformer_blocks.0."
    assert {path.removeprefix(block): (d.operand, d.reason) for path, d in decisions.items()}.items() >= {
        "attn.to_k": ("weight", "1.70x as fast as dense (128 x 64 -> 192, gpu.json)"),
        "ff.net.0.proj": ("activation", "1.50x as fast as dense (128 x 64 -> 256, gpu.json)"),
        "attn.add_k_proj": ("none", "would be 0.95x as fast as dense (8 x 64 -> 192, gpu.json)"),
        "attn.to_add_out": ("none", "would be 0.80x as fast as dense (8 x 64 -> 64, gpu.json)"),
        "ff_context.net.2": ("none", "would be 0.60x as fast as dense (8 x 256 -> 64, gpu.json)"),
        "single_transformer_blocks.0.proj_out".removeprefix(block): (
            "weight", "1.20x as fast as dense (136 x 320 -> 64, gpu.json)",
        ),
    }.items()  # fmt: skip
    groups = select(tiny_groups(), Sparsity(costs=costs)).groups
    assert {(group.name, group.operand, group.gain) for group in groups} == {
        ("transformer_blocks.0.attn.to_q", "weight", 1.7),
        ("transformer_blocks.0.attn.to_out.0", "weight", 1.6),
        ("transformer_blocks.0.ff.net.0.proj", "activation", 1.5),
        ("transformer_blocks.0.ff.net.2", "weight", 1.9),
        ("single_transformer_blocks.0.proj_mlp", "weight", 1.8),
        ("single_transformer_blocks.0.proj_out", "weight", 1.2),
    }


@pytest.mark.parametrize(
    "sparsity",
    [
        {"operand": "activation"}, {"method": "paper"}, {"method": "none"}, {"rank": 16}, {"norm_scale": True},
    ],
)  # fmt: skip
def test_one_operand_is_judged_by_what_was_measured_only(costs: str, sparsity: dict[str, object]) -> None:
    decisions = _decisions(Sparsity.model_validate(sparsity | {"costs": costs}))
    text = decisions["transformer_blocks.0.attn.add_q_proj"]
    assert (text.operand, text.reason[:13]) == ("none", "would be 0.92")
    assert decisions["single_transformer_blocks.0.proj_out"].operand == "none"
    assert {decision.operand for decision in decisions.values()} == {"none", "activation"}
    without = select(tiny_groups(), Sparsity.model_validate(sparsity))
    sparse = {(d.operand, d.reason) for d in without.decisions if d.linear.refusal is None}
    assert sparse == {("activation", "operand activation by the recipe")}
    assert {group.gain for group in without.groups} == {None}


@pytest.mark.parametrize("rank", [0, "auto"])
def test_no_rank_and_no_scale_leave_the_choice_open(rank: int | str) -> None:
    assert Sparsity.model_validate({"rank": rank, "norm_scale": False}).operands == ("activation", "weight")


def test_globs_fix_the_operand_whatever_it_costs(costs: str) -> None:
    globs = {
        "*.ff_context.net.2": "weight",
        "*.ff.net.2": "none",
        "*.add_q_proj": "activation",
        "*.to_out.0": "auto",
    }
    sparsity = Sparsity.model_validate({"operand": globs, "costs": costs})
    decisions = _decisions(sparsity)
    block = "transformer_blocks.0."
    assert {path: decisions[block + path].operand for path in (
        "ff_context.net.2", "ff.net.2", "attn.add_q_proj", "attn.to_out.0", "ff.net.0.proj", "ff_context.net.0.proj",
    )} == {
        "ff_context.net.2": "weight", "ff.net.2": "none", "attn.add_q_proj": "activation",
        "attn.to_out.0": "weight", "ff.net.0.proj": "activation", "ff_context.net.0.proj": "none",
    }  # fmt: skip
    assert (
        decisions[block + "ff_context.net.2"].reason == "operand weight by the recipe ('*.ff_context.net.2')"
    )
    slow = next(g for g in select(tiny_groups(), sparsity).groups if g.name == block + "ff_context.net.2")
    assert slow.gain == 0.6


def test_linears_join_the_node_that_a_glob_has_begun(tmp_path: Path) -> None:
    """Alone the two left would be slower as activations; with the one that a glob has made so, they are not."""
    table = {(8, 64, 64): (0.9, 0.9), (8, 64, 128): (0.9, 1.1), (8, 64, 192): (1.2, 1.0)}
    costs = str(write_costs(tmp_path / "gpu.json", table))
    linears = tuple(Linear(name, 64, 64, True, None) for name in "qkv")
    groups = (LinearGroup("q", linears, 8),)
    plan = select(groups, Sparsity(operand={"q": "activation"}, costs=costs))
    assert [(group.operand, len(group.linears), group.gain) for group in plan.groups] == [
        ("activation", 3, 1.2)
    ]
    assert plan.decisions[1].reason == "1.20x as fast as dense (8 x 64 -> 192, gpu.json)"
    plan = select(groups, Sparsity(operand={"q": "none"}, costs=costs))
    assert [(group.operand, len(group.linears), group.gain) for group in plan.groups] == [("weight", 2, 1.1)]


def test_without_a_table_the_roofline_decides_and_nothing_counts_as_measured() -> None:
    plan = select(tiny_groups(), Sparsity())
    assert {(group.operand, group.gain) for group in plan.groups} == {("weight", None)}
    reasons = {decision.linear.path: decision.reason for decision in plan.decisions}
    assert (
        reasons["transformer_blocks.0.attn.to_q"]
        == "1.40x as fast as dense (128 x 64 -> 192, roofline of an H100)"
    )
    narrow, wide = (Linear(name, 3088, size, True, None) for name, size in (("narrow", 64), ("wide", 8192)))
    groups = tuple(LinearGroup(linear.path, (linear,), 4096) for linear in (narrow, wide))
    decisions = select(groups, Sparsity()).decisions  # K = 3088 rules the weight operand out
    assert [decision.operand for decision in decisions] == ["none", "activation"]
    assert "would be" in decisions[0].reason and "roofline" in decisions[0].reason


def test_where_the_table_says_nothing_the_roofline_decides_for_auto_alone(tmp_path: Path) -> None:
    far = str(write_costs(tmp_path / "gpu.json", {(4096, 3072, 3072): (0.5, 0.5)}))
    plan = select(tiny_groups(), Sparsity(costs=far))
    assert {(group.operand, group.gain) for group in plan.groups} == {("weight", None)}
    plan = select(tiny_groups(), Sparsity(operand="activation", costs=far))
    assert {(group.operand, group.gain) for group in plan.groups} == {("activation", None)}


def test_nothing_left_names_the_first_reason(tmp_path: Path) -> None:
    slow = dict.fromkeys(TEXT | IMAGE | SINGLE, (0.9, 0.9))
    costs = str(write_costs(tmp_path / "gpu.json", slow))
    with pytest.raises(
        InputError, match=r"No linear would become sparse \('.*': would be 0.90x as fast as dense"
    ):
        select(tiny_groups(), Sparsity(costs=costs))


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cost table .*none.json does not exist"):
        select(tiny_groups(), Sparsity(costs=str(tmp_path / "none.json")))


@pytest.mark.parametrize("gpu", ["sm100", "sm103", "sm110"])
def test_where_the_speed_is_unknown_only_globs_and_measurements_make_sparse(tmp_path: Path, gpu: str) -> None:
    """The kernels run there as code for older GPUs, of which an H100's figures say nothing."""
    h100 = write_costs(tmp_path / "h100.json", TEXT | IMAGE | SINGLE)
    for sparsity in (Sparsity(), Sparsity(operand="weight"), Sparsity(costs=str(h100))):
        assert select(tiny_groups(), sparsity, ("sm80",)).groups
        with pytest.raises(
            InputError, match=f"speed on {gpu} is unknown: give sparsity.costs, by 'lynx-comp"
        ):
            select(tiny_groups(), sparsity, (gpu,))
    plan = select(tiny_groups(), Sparsity(operand={"*.ff.net.2": "weight"}), (gpu,))
    assert [group.name for group in plan.groups] == ["transformer_blocks.0.ff.net.2"]
    own = tmp_path / "own.json"
    own.write_text(json.dumps(json.loads(h100.read_text()) | {"architecture": gpu}))
    sparsity = Sparsity(costs=str(own))
    assert select(tiny_groups(), sparsity, (gpu,)) == select(tiny_groups(), sparsity)


FP8 = {
    (128, 64, 192): {"bf16_weight": 1.4, "fp8_weight.all": 2.3, "fp8_dense.all": 1.8, "fp8_activation.all": 2.2},
    (128, 64, 64): {"bf16_weight": 1.4, "fp8_weight.all": 1.2, "fp8_dense.all": 1.1, "fp8_activation.all": 1.1},
    (128, 64, 256): {"bf16_weight": 1.4, "fp8_weight.all": 2.0, "fp8_dense.all": 2.1, "fp8_activation.all": 2.0},
    (128, 256, 64): {"bf16_weight": 1.4, "fp8_weight.all": 1.9, "fp8_dense.all": 1.8, "fp8_activation.all": 2.1},
    (8, 64, 256): {"bf16_weight": 0.9, "fp8_weight.all": 0.8, "fp8_dense.all": 0.7, "fp8_activation.all": 0.9},
}  # fmt: skip
BLOCK = "transformer_blocks.0."


@pytest.fixture
def fp8_costs(tmp_path: Path) -> str:
    path = tmp_path / "fp8.json"
    results = [
        {"shape": dict(zip(("tokens", "channels", "out_channels"), sizes, strict=True)), "ratios": ratios}
        for sizes, ratios in FP8.items()
    ]
    path.write_text(json.dumps({"device": "some GPU", "results": results}))
    return str(path)


def test_on_hopper_the_fastest_of_all_forms_wins(fp8_costs: str) -> None:
    plan = select(tiny_groups(), Sparsity(costs=fp8_costs), ("sm90",))
    forms = {d.linear.path.removeprefix(BLOCK): (d.form.words, d.reason) for d in plan.decisions}
    assert (
        forms.items()
        >= {
            "attn.to_q": ("2:4 weights in FP8", "2.30x as fast as dense (128 x 64 -> 192, fp8.json)"),
            "attn.to_out.0": ("2:4 weights", "1.40x as fast as dense (128 x 64 -> 64, fp8.json)"),
            "ff.net.0.proj": ("dense FP8", "2.10x as fast as dense (128 x 64 -> 256, fp8.json)"),
            "ff.net.2": ("2:4 activations in FP8", "2.10x as fast as dense (128 x 256 -> 64, fp8.json)"),
        }.items()
    )
    groups = {group.name.removeprefix(BLOCK): group for group in plan.groups}
    assert (groups["ff.net.0.proj"].operand, groups["ff.net.0.proj"].fp8, groups["ff.net.0.proj"].gain) == (
        "none", True, 2.1,
    )  # fmt: skip
    assert not any(d.fp8 for d in plan.decisions if d.linear.refusal is not None), (
        "embedders, modulation, the end"
    )
    assert select(tiny_groups(), Sparsity(costs=fp8_costs, precision="bf16"), ("sm90",)) == select(
        tiny_groups(), Sparsity(costs=fp8_costs), ("sm80",)
    )


@pytest.mark.parametrize(
    "gpus", [(), ("sm80",), ("sm120",), ("sm90", "sm120"), ("sm80", "sm86", "sm89", "sm120")]
)
def test_auto_is_fp8_only_where_it_was_timed(fp8_costs: str, gpus: tuple[str, ...]) -> None:
    assert not any(group.fp8 for group in select(tiny_groups(), Sparsity(costs=fp8_costs), gpus).groups)
    if {"sm80", "sm86"}.intersection(gpus):
        with pytest.raises(
            InputError, match="precision is fp8, and this engine is for sm80.*run on sm89, sm90, sm120 alone"
        ):
            select(tiny_groups(), Sparsity(precision="fp8"), gpus)
    elif gpus:
        forced = Sparsity(costs=fp8_costs, precision="fp8")
        assert all(group.fp8 for group in select(tiny_groups(), forced, gpus).groups)


@pytest.mark.parametrize(("gpu", "fp8"), [("sm89", True), ("sm120", True), ("sm86", False)])
def test_auto_is_fp8_where_a_bench_on_that_gpu_timed_it(fp8_costs: str, gpu: str, fp8: bool) -> None:
    file = Path(fp8_costs)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": gpu}))
    groups = select(tiny_groups(), Sparsity(costs=fp8_costs), (gpu,)).groups
    assert any(group.fp8 for group in groups) == fp8


@pytest.mark.parametrize("asked", [{"method": "paper"}, {"rank": 16}, {"norm_scale": True}])
def test_what_fp8_has_not_keeps_auto_in_16_bits(asked: dict[str, object]) -> None:
    plan = select(tiny_groups(), Sparsity.model_validate(asked), ("sm90",))
    assert {(group.operand, group.fp8) for group in plan.groups} == {("activation", False)}


@pytest.mark.parametrize(("operand", "words"), [
    ("weight", "2:4 weights in FP8"), ("activation", "2:4 activations in FP8"), ("none", "dense FP8"),
])  # fmt: skip
def test_precision_fp8_and_one_operand_are_done_where_nothing_was_measured(operand: str, words: str) -> None:
    plan = select(tiny_groups(), Sparsity.model_validate({"precision": "fp8", "operand": operand}))
    assert {(group.operand, group.fp8) for group in plan.groups} == {(operand, True)}
    assert {d.reason for d in plan.decisions if d.fp8} == {f"{words} by the recipe"}
    assert all(d.fp8 for d in plan.decisions if d.linear.refusal is None)


def test_precision_fp8_leaves_dense_what_is_slower_and_never_chooses_16_bits(fp8_costs: str) -> None:
    plan = select(tiny_groups(), Sparsity(costs=fp8_costs, precision="fp8"), ("sm90",))
    decisions = {d.linear.path.removeprefix(BLOCK): d for d in plan.decisions}
    assert decisions["attn.to_out.0"].form.words == "2:4 weights in FP8"  # 2:4 in 16 bits is faster
    assert (
        decisions["ff_context.net.0.proj"].reason
        == "would be 0.90x as fast as dense (8 x 64 -> 256, fp8.json)"
    )
    assert all(group.fp8 for group in plan.groups)


def test_globs_say_the_operand_and_speed_the_precision(fp8_costs: str) -> None:
    globs = {
        "*.ff.net.0.proj": "weight",
        "*.attn.to_out.0": "weight",
        "*.ff.net.2": "none",
        "*_context.*": "none",
    }
    sparsity = Sparsity.model_validate({"operand": globs, "costs": fp8_costs})
    plan = select(tiny_groups(), sparsity, ("sm90",))
    decisions = {d.linear.path.removeprefix(BLOCK): d for d in plan.decisions}
    assert {name: decisions[name].form.words for name in (
        "ff.net.0.proj", "attn.to_out.0", "ff.net.2", "ff_context.net.0.proj",
    )} == {
        "ff.net.0.proj": "2:4 weights in FP8", "attn.to_out.0": "2:4 weights", "ff.net.2": "dense FP8",
        "ff_context.net.0.proj": "dense",
    }  # fmt: skip
    forced = select(tiny_groups(), sparsity.model_copy(update={"precision": "fp8"}), ("sm90",))
    decisions = {d.linear.path.removeprefix(BLOCK): d for d in forced.decisions}
    assert decisions["attn.to_out.0"].form.words == "2:4 weights in FP8"
    assert decisions["ff_context.net.0.proj"].form.words == "dense FP8"
    assert decisions["ff_context.net.0.proj"].reason == "dense FP8 by the recipe ('*_context.*')"


def test_sizes_that_fp8_kernels_do_not_take() -> None:
    """K of 80 is for FP8 alone, where 2:4 weights in 16 bits want steps of 64; K of 32784 is too much for FP8."""
    odd, long = Linear("odd", 80, 4096, True, None), Linear("long", 32784, 4096, True, None)
    groups = tuple(LinearGroup(linear.path, (linear,), 4096) for linear in (odd, long))
    assert [d.form.words for d in select(groups, Sparsity(operand="weight"), ("sm90",)).decisions] == [
        "2:4 weights in FP8", "dense",
    ]  # fmt: skip
    decisions = select(groups, Sparsity(precision="fp8"), ("sm90",)).decisions
    assert decisions[1].reason == "K = 32784 is more than the 32768 that FP8 kernels take"
    header = (Path(__file__).parents[2] / "plugins" / "kernels" / "fp8_linear.h").read_text()
    assert f"kMaxFp8Channels = {FP8_CHANNELS};" in header


@pytest.mark.parametrize(
    ("weight", "activation", "dense", "words"),
    [
        (2.0, 2.09, 1.8, "2:4 weights in FP8"),
        (2.0, 2.11, 1.8, "2:4 activations in FP8"),
        (2.0, 2.0, 1.95, "dense FP8"),
        (2.0, 2.0, 1.90, "2:4 weights in FP8"),
    ],
)
def test_of_forms_alike_in_speed_the_most_accurate_counts(
    tmp_path: Path, weight: float, activation: float, dense: float, words: str
) -> None:
    """Runs of the bench differ by as much; errors by a factor."""
    ratios = {
        "fp8_weight.all": weight,
        "fp8_activation.all": activation,
        "fp8_dense.all": dense,
        "bf16_weight": 1.4,
    }
    path = tmp_path / "fp8.json"
    shape = {"tokens": 128, "channels": 64, "out_channels": 192}
    path.write_text(json.dumps({"results": [{"shape": shape, "ratios": ratios}]}))
    groups = (LinearGroup("q", (Linear("q", 64, 192, True, None),), 128),)
    assert select(groups, Sparsity(costs=str(path)), ("sm90",)).decisions[0].form.words == words


def test_a_roofline_does_not_compete_with_what_was_measured_in_its_precision(tmp_path: Path) -> None:
    """The roofline knows nothing of what makes few tokens slow, and would win over what was measured there."""
    shape = {"tokens": 512, "channels": 3072, "out_channels": 9216}
    (tmp_path / "all.json").write_text(
        json.dumps({"results": [{"shape": shape, "ratios": {"bf16_weight": 1.1}}]})
    )
    groups = (LinearGroup("q", (Linear("q", 3072, 9216, True, None),), 512),)
    sparsity = Sparsity(costs=str(tmp_path / "all.json"))
    assert roofline(512, 3072, 9216, 64).gain(Form("activation")) > 1.1 * 1.05
    assert select(groups, sparsity, ("sm80",)).decisions[0].form.words == "2:4 weights"
    decision = select(groups, sparsity, ("sm90",)).decisions[0]
    assert decision.fp8 and "roofline" in decision.reason, "in FP8 nothing was measured"


@pytest.mark.parametrize("when", ["solved", "tuned"])
def test_the_order_by_error_is_the_measured_one(when: str) -> None:
    """Tuning end to end moves layers of 2:4 weights away from dense ones: there what is left at the end counts."""
    errors = json.loads((Path(__file__).parents[2] / "engines" / "bench" / "summary.json").read_text())
    solved = "_solved" * (when == "solved")
    methods = [
        "fp8_dense" if form.operand == "none" else f"{form.operand}{'_fp8' * form.fp8}{solved}"
        for form in BY_ERROR
    ]
    layers, outputs = (
        [errors[f"quality.digits_flux.{method}.{what}"] for method in methods]
        for what in ("layer_error", "output_error")
    )
    if when == "tuned":
        del layers[BY_ERROR.index(Form("weight"))]
    assert layers == sorted(layers)
    assert outputs[1:] == sorted(
        outputs[1:]
    )  # tuned, 2:4 weights err less than dense FP8, which is not tuned


def test_operand_none_needs_fp8_to_change_anything() -> None:
    with pytest.raises(
        InputError, match="would become sparse .*operand none by the recipe, and FP8 is for sm89, sm90, sm120"
    ):
        select(tiny_groups(), Sparsity(operand="none"), ("sm80",))
    groups = (LinearGroup("wide", (Linear("wide", 3072, 3072, True, None),), 4096),)
    plan = select(groups, Sparsity(operand="none"), ("sm90",))
    assert plan.decisions[0].form.words == "dense FP8" and "roofline" in plan.decisions[0].reason
