# SPDX-License-Identifier: Apache-2.0
"""The recipe: defaults, paths, and one clear error with file, line and key for each mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lynx_compile.errors import InputError
from lynx_compile.models.prompts import read
from lynx_compile.models.structure import Linear, LinearGroup
from lynx_compile.passes.calibrate import TOKENS_PER_CHANNEL, measurements
from lynx_compile.passes.select import select
from lynx_compile.recipe import (
    DEFAULT_OUTPUT_ERROR,
    DEFAULT_PROMPTS,
    FORMS,
    Budget,
    Calibration,
    Compare,
    Compensation,
    Engine,
    Lora,
    Model,
    ModuleModel,
    OnnxModel,
    Sparsity,
    load_recipe,
)
from lynx_compile.tools.write_prompts import COUNT, default_prompts
from tests.conftest import FLUX_DEV, RECIPE, flux_groups, open_dit, tiny_groups

ENGINES = Path(__file__).parents[1] / "engines"


def _error(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  dtype: fp16", "  dtpe: fp16", r"r.yaml:3: unknown key 'model.dtpe'. Did you mean 'dtype'?"),
        (
            "  dtype: fp16",
            "  dtype: fp32",
            "r.yaml:3: 'model.dtype' is wrong: Input should be 'bf16' or 'fp16'",
        ),
        ("  source: model", "  dtype: bf16", "r.yaml:3: the key 'dtype' is there twice."),
        (
            "  source: model\n",
            "",
            "r.yaml:1: the key 'model.source' is missing. Add 'source:' under 'model'.",
        ),
        ("  source: model", "  source: ''", "r.yaml:2: 'model.source' is wrong"),
        ("call:", "cal:", "r.yaml:4: unknown key 'cal'. Did you mean 'call'?"),
        ("  batch: 2", "  batch: 0", "r.yaml:12: 'calibration.batch' is wrong"),
        ("  batch: 2", "  batch: two", "r.yaml:12: 'calibration.batch' is wrong"),
        ("  batch: 2", "  batch: 2.5", "r.yaml:12: 'calibration.batch' is wrong"),
        (
            "  samples: 6",
            "  recording: calls",
            "'calibration' is wrong: give either 'prompts' or",
        ),
        ("  samples: 6", "  samples: -1", "r.yaml:11: 'calibration.samples' is wrong"),
        ("  samples: 6", "  memory_gib: 0", "r.yaml:11: 'calibration.memory_gib' is wrong"),
        (
            "  batch: 2",
            "  batch: 2\nsparsity:\n  rank: 17",
            "r.yaml:14: 'sparsity.rank' is wrong: it must be 'auto' or",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity:\n  rank: 256",
            "r.yaml:14: 'sparsity.rank' is wrong: it must be 'auto' or",
        ),
        ("  batch: 2", "  batch: 2\nsparsity:\n  rank: true", "r.yaml:14: 'sparsity.rank' is wrong"),
        (
            "  batch: 2",
            "  batch: 2\nsparsity: {method: magnitude, operand: activation}",
            "r.yaml:13: 'sparsity' is wrong: method 'magnitude' prunes weights in 16 bits",
        ),
        (
            "  tune: false",
            "  tune: blockwise\nsparsity: {method: magnitude}",
            "'compensation' is wrong: method 'magnitude' calibrates nothing",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity: {method: none, rank: 16}",
            "r.yaml:13: 'sparsity' is wrong: method 'none'",
        ),
        ("  batch: 2", "  batch: 2\nsparsity: {method: best}", "'sparsity.method' is wrong"),
        (
            "  batch: 2",
            "  batch: 2\nsparsity: {include: 3}",
            "'sparsity.include' is wrong: it should be a list, such",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity:\n  operand: weights",
            "r.yaml:14: 'sparsity.operand' is wrong: Input should be 'auto', 'activation', 'weight' or 'none' (got 'we",
        ),
        ("  batch: 2", "  batch: 2\nsparsity:\n  operand: 3", "r.yaml:14: 'sparsity.operand' is wrong"),
        (
            "  batch: 2",
            "  batch: 2\nsparsity: {operand: none, precision: fp16}",
            "r.yaml:13: 'sparsity' is wrong: operand 'none' is for precision 'fp8' or 'auto'",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity:\n  precision: bf16",
            "'sparsity' is wrong: precision is bf16 and model.dtype fp16; set precision to fp16, fp8 or auto",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity:\n  precision: int8",
            "r.yaml:14: 'sparsity.precision' is wrong",
        ),
        *(
            (
                "  batch: 2",
                f"  batch: 2\nsparsity: {{precision: fp8, {asked}}}",
                "FP8 linears have no low-rank branch",
            )
            for asked in ("rank: 16", "norm_scale: true", "method: paper")
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity:\n  operand:\n    '*.ff.*': weight\n    '*': both",
            "r.yaml:16: 'sparsity.operand.*' is wrong: Input should be 'auto', 'activation', 'weight' or 'none' (got",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity:\n  operand:\n    '*.ff.*': weight\n    '*.ff.*': none",
            "r.yaml:16: the key '*.ff.*' is there twice.",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity: {method: paper, operand: {'*.ff.*': weight}}",
            "r.yaml:13: 'sparsity' is wrong: method 'paper' prunes activations",
        ),
        (
            "  batch: 2",
            "  batch: 2\nsparsity: {operand: weight, rank: 16}",
            "r.yaml:13: 'sparsity' is wrong: the weight operand has no low-rank branch",
        ),
        ("  batch: 2", "  batch: 2\nsparsity:\n  costs: ''", "r.yaml:14: 'sparsity.costs' is wrong"),
        ("  batch: 2", "  batch: 2\nsparsity:\n  costs: [a.json]", "r.yaml:14: 'sparsity.costs' is wrong"),
        ("  batch: 2", "  batch: 2\nengine:\n  gpus: [sm80, sm99]", "r.yaml:14: 'engine.gpus.1' is wrong"),
        ("  batch: 2", "  batch: 2\nengine:\n  gpus: []", "r.yaml:14: 'engine.gpus' is wrong"),
        ("  batch: 2", "  batch: 2\nengine: {weights: shared}", "'engine.weights' is wrong"),
        ("model:", "model: [", "this is not valid YAML"),
        ("model:", "model: !!python/object/apply:os.system ['true']\nx:", "this is not valid YAML"),
        (RECIPE, "", "a recipe is a mapping of sections. Start with 'model:'."),
        (RECIPE, "- a\n- b\n", "a recipe is a mapping of sections."),
        (
            RECIPE,
            "a: &a [*a, *a]\n",
            "r.yaml:1: YAML takes *a for an alias, since it begins with *. Quote it: '*a'.",
        ),
        ("  batch: 2", "  1: 4", "r.yaml:12: 'calibration.1' is wrong: Keys should be strings"),
        (RECIPE, "\x00", "this is not valid YAML"),
        ("  source: model", '  source: "a\\0b"', "r.yaml:2: the value holds a NUL character."),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    assert message in _error(tmp_path, RECIPE.replace(old, new, 1))


def test_unreadable_files(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.yaml", "does not exist"),
        (tmp_path, "cannot be read"),
        (tmp_path / "binary.yaml", "is not UTF-8 text"),
        (tmp_path / "huge.yaml", "is larger than 1 MiB"),
        (Path("/dev/zero"), "is larger than 1 MiB"),
    ):
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfd")
        (tmp_path / "huge.yaml").write_bytes(b" " * (2 << 20))
        with pytest.raises(InputError, match=message):
            load_recipe(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "  samples: 016",
            "r.yaml:11: 016 can be read as more than one number. Write it in decimal digits alone",
        ),
        ("  samples: 1_6", "r.yaml:11: 1_6 can be read as more than one number."),
        ("  samples: 0x10", "r.yaml:11: 0x10 can be read as more than one number."),
        (
            "  samples: 16:9",
            "r.yaml:11: 'calibration.samples' is wrong: it should be a whole number (got '16:9')",
        ),
        (
            "  samples: yes",
            "r.yaml:11: yes is read differently by YAML's versions. Write true; or quote it if it is",
        ),
        (
            "sparsity:\n  norm_scale: off",
            "r.yaml:12: off is read differently by YAML's versions. Write false; or",
        ),
        (
            "sparsity:\n  norm_scale: 1",
            "r.yaml:12: 'sparsity.norm_scale' is wrong: it should be true or false",
        ),
        (
            "sparsity:\n  exclude: [*.ff.*]",
            "r.yaml:12: YAML takes *.ff.* for an alias, since it begins with *.",
        ),
        (
            "sparsity:\n  operand:\n    *.ff.*: weight",
            "r.yaml:13: YAML takes *.ff.* for an alias, .* Quote it: '*.ff.*'.",
        ),
        ("sparsity:\n  exclude: *", "YAML takes * for an alias, since it begins with *. Quote it: '*'."),
        ("sparsity:\n  exclude: {a: b}", "'sparsity.exclude' is wrong: it should be a list, such as [a, b]"),
        ("sparsity: weight", "r.yaml:11: 'sparsity' is wrong: it should be a section, with keys of its own"),
        (
            "sparsity:\n\tridge: 0.1",
            "is not valid YAML (found character '\\t' that cannot start any token). Indent",
        ),
        (
            "engine:\n  plugin: a: b",
            "mapping values are not allowed here). Indent the keys of one section",
        ),
        ("engine:\n  plugin: @a", "that cannot start any token). Quote the value."),
        (
            "engine:\n  plugin: 3",
            "'engine.plugin' is wrong: it should be text; quote what looks like a number (got 3)",
        ),
    ],
)
def test_what_yaml_reads_otherwise_than_people(tmp_path: Path, line: str, message: str) -> None:
    found = _error(tmp_path, RECIPE.replace("  samples: 6\n  batch: 2", line))
    assert all(part in found for part in message.split(" .* ")), found


def test_what_is_plain_to_people_is_taken(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("  dtype: fp16", "  dtype: fp16\n  revision: '0123456'\n  components: transformer")
        + "sparsity: {ridge: 1e-3, exclude: '*.ff.*'}\nengine: {gpus: sm80}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert isinstance(recipe.model, Model)
    assert (recipe.model.revision, recipe.model.components) == ("0123456", ("transformer",))
    assert (recipe.sparsity.ridge, recipe.sparsity.exclude) == (1e-3, ("*.ff.*",))
    assert recipe.engine.gpus == ("sm80",)


@pytest.mark.parametrize(
    ("source", "taken", "revision"),
    [
        ("https://huggingface.co/black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev", None),
        ("https://huggingface.co/black-forest-labs/FLUX.1-dev/", "black-forest-labs/FLUX.1-dev", None),
        ("huggingface.co/black-forest-labs/FLUX.1-dev/tree/main", "black-forest-labs/FLUX.1-dev", None),
        ("https://hf.co/owner/name/tree/v2?x=1", "owner/name", "v2"),
        ("owner/name", "owner/name", None),
    ],
)
def test_a_page_of_the_hub_is_its_id(tmp_path: Path, source: str, taken: str, revision: str | None) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("source: model", f"source: {source}"))
    model = load_recipe(tmp_path / "r.yaml").model
    assert isinstance(model, Model)
    assert (model.source, model.revision) == (taken, revision)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{source: 'https://huggingface.co/a/b/blob/main/c.safetensors'}", "source is one file; give its repository"),
        ("{source: 'https://example.com/a/b'}", "source is a URL ('https://example.com/a/b'); give a"),
        ("{module: 'mine.net:Net'}", "r.yaml:1: the key 'model.weights' is missing."),
        ("{module: mine.net, weights: w.safetensors}", "'model.module' is wrong"),
        ("{module: 'mine:Net', weights: w, config: 3}", "'model.config' is wrong"),
        ("{module: 'mine:Net', weights: w, revision: main}", "unknown key 'model.revision'. Known keys here: module"),
        ("{onnx: a.onnx, source: a/b}", "r.yaml:1: 'model' has both 'onnx' and 'source'. Keep one of them."),
        ("{onnx: a.onnx, weight: b}", "unknown key 'model.weight'. Known keys here: onnx, dtype."),
        ("{onnx: ''}", "'model.onnx' is wrong"),
        ("{sorce: a/b}", "unknown key 'model.sorce'. Did you mean 'source'?"),
        ("a/b", "'model' is wrong: it should be a section, with keys of its own (got 'a/b')"),
    ],
)  # fmt: skip
def test_mistakes_in_the_three_forms_of_a_model(tmp_path: Path, model: str, message: str) -> None:
    assert message in _error(tmp_path, f"model: {model}\n{RECIPE[RECIPE.index('call') :]}")


def test_the_other_forms_of_a_model(tmp_path: Path) -> None:
    def load(model: str) -> Model | ModuleModel | OnnxModel:
        rest = RECIPE[RECIPE.index("call") :].replace("prompts: prompts.safetensors", "recording: calls")
        (tmp_path / "r.yaml").write_text(f"model: {model}\n{rest}")
        return load_recipe(tmp_path / "r.yaml").model

    assert load("{onnx: a/b.onnx}") == OnnxModel(onnx=str(tmp_path / "a" / "b.onnx"))
    weights = str(tmp_path / "w.safetensors")
    assert load(
        "{module: 'mine.net:Net', weights: w.safetensors, config: {depth: 2, name: a}}"
    ) == ModuleModel(module="mine.net:Net", weights=weights, config={"depth": 2, "name": "a"})
    assert load("{module: 'mine:Net', weights: w.safetensors, config: c.json}") == ModuleModel(
        module="mine:Net", weights=weights, config=str(tmp_path / "c.json")
    )


COMMAND = str(Path(sys.executable).parent / "lynx-compile")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "ascii"}])
def test_names_of_any_script_under_any_locale(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "modèle"
    folder.mkdir()
    recipe = folder / "モデル.yaml"
    text = RECIPE.replace("source: model", "source: ./größe").replace("  prompts: prompts.safetensors\n", "")
    recipe.write_text(text, encoding="utf-8")
    command = [COMMAND, recipe, "-o", folder / "é.engine"]
    found = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)
    text = found.stderr.decode()
    assert (found.returncode, "Traceback" in text) == (2, False), text
    assert "does not exist. Correct model.source" in text


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path: Path) -> None:
    command = [COMMAND.encode(), b"\xff.yaml", b"-o", b"x.engine"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert found.returncode == 2
    assert found.stderr == b"error: The recipe \\udcff.yaml does not exist. Check the path.\n"


def test_paths_are_relative_to_the_recipe_and_the_digest_is_not(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "r.yaml").write_text(RECIPE + "sparsity: {costs: bench/gpu.json}\n")
        recipe = load_recipe(tmp_path / name / "r.yaml")
        assert recipe.model.source == str(tmp_path / name / "model")
        assert recipe.calibration.prompts == str(tmp_path / name / "prompts.safetensors")
        assert recipe.sparsity.costs == str(tmp_path / name / "bench" / "gpu.json")
        digests.add(recipe.digest)
    assert len(digests) == 1


def test_every_key_says_what_it_is() -> None:
    """``init`` and the reference are made of it."""
    sections = (*FORMS.values(), Lora, Calibration, Sparsity, Budget, Compensation, Engine, Compare)
    keys = {f"{s.__name__}.{key}": field for s in sections for key, field in s.model_fields.items()}
    assert [name for name, field in keys.items() if not field.description] == []
    assert str(DEFAULT_OUTPUT_ERROR) in str(keys["Budget.max_output_error"].description)


def test_the_shipped_recipes_are_valid() -> None:
    flux = load_recipe(ENGINES / "flux.yaml")
    assert (flux.model.source, flux.call["height"]) == ("black-forest-labs/FLUX.1-dev", 1024)
    assert Path(flux.calibration.prompts or "").is_file()
    assert Path(flux.sparsity.costs or "").is_file() and flux.sparsity.operands == ("activation", "weight")
    digits = load_recipe(ENGINES / "digits-flux.yaml")
    assert (digits.model.dtype, digits.sparsity.operands) == ("fp16", ("activation",))


def test_flux_on_hopper_is_2_of_4_weights_in_fp8_throughout() -> None:
    """By the file of measured times that its recipe names."""
    recipe = load_recipe(ENGINES / "flux.yaml")
    plan = select(flux_groups(FLUX_DEV, side=64, text=512, batch=1), recipe.sparsity, ("sm90",))
    assert {(group.operand, group.fp8) for group in plan.groups} == {("weight", True)}
    reasons = {decision.linear.path: decision.reason for decision in plan.decisions}
    shape, source = "4096 x 3072 -> 9216", "nvidia-h200-fp8.json"
    assert re.fullmatch(
        rf"2\.[234]\dx as fast as dense \({shape}, {source}\)", reasons["transformer_blocks.0.attn.to_q"]
    )
    assert all(1.6 < (group.gain or 0) < 2.5 for group in plan.groups)
    before = select(flux_groups(FLUX_DEV, side=64, text=512, batch=1), recipe.sparsity, ("sm80",))
    assert {(group.operand, group.fp8) for group in before.groups} == {("weight", False)}


@pytest.mark.parametrize("name", sorted(path.name for path in ENGINES.glob("*.yaml")))
def test_the_shipped_recipes_calibrate_on_enough_tokens(name: str) -> None:
    """As many tokens per channel as the solves need, for every linear, by arithmetic."""
    recipe = load_recipe(ENGINES / name)
    if recipe.model.source == "black-forest-labs/FLUX.1-dev":
        groups = flux_groups(FLUX_DEV, side=64, text=512, batch=1)
    else:
        once = recipe.calibration.model_copy(update={"samples": 1, "batch": 1})
        groups = open_dit(recipe.model_copy(update={"calibration": once}))[0].groups
    plan = select(groups, recipe.sparsity)
    rows = {group.name: group.tokens for group in plan.groups}  # of one sample
    calls = recipe.calibration.samples * (
        recipe.calibration.states_per_prompt or recipe.call["num_inference_steps"]
    )
    tokens_per_channel = {
        one.name: calls * min(recipe.calibration.tokens_per_call, rows[one.name]) / one.channels
        for one in measurements(plan)
    }
    assert min(tokens_per_channel.values()) >= TOKENS_PER_CHANNEL


def test_the_flux_recipe_fits_the_flux_class() -> None:
    """FLUX.1-dev's recipe against the class at a small size: its globs, ranks and candidates."""
    recipe = load_recipe(ENGINES / "flux.yaml")
    groups = tiny_groups()
    plan = select(groups, recipe.sparsity)
    sparse = {linear.path for group in plan.groups for linear in group.linears}
    assert "transformer_blocks.0.attn.to_q" in sparse and "single_transformer_blocks.0.proj_out" in sparse
    assert not any("norm" in path or "embed" in path for path in sparse)


@pytest.mark.parametrize(
    ("channels", "rank"), [(64, 16), (192, 16), (768, 32), (960, 32), (1024, 32), (3072, 64), (12288, 64)]
)
def test_default_rank(channels: int, rank: int) -> None:
    assert Sparsity().rank_for(channels) == Sparsity(method="paper").rank_for(channels) == rank
    assert Sparsity(method="none").rank_for(channels) == 0


def test_norm_scale_defaults_to_the_method() -> None:
    assert [Sparsity(method=m).uses_norm_scale for m in ("joint", "paper", "none")] == [False, True, False]
    assert Sparsity(norm_scale=True).uses_norm_scale


def test_globs() -> None:
    groups = tiny_groups()
    left = select(groups, Sparsity(include=("single_*",), exclude=("*.proj_mlp",))).groups
    assert {linear.path.split(".")[-1] for group in left for linear in group.linears} == {
        "to_q", "to_k", "to_v", "proj_out",
    }  # fmt: skip
    merged = next(group for group in left if len(group.linears) == 3)
    assert (
        merged.name == "single_transformer_blocks.0.proj_mlp"
    )  # the tensor keeps its name, its moments are reused
    reasons = {d.linear.path: d.reason for d in select(groups, Sparsity(exclude=("*.ff.*",))).decisions}
    assert reasons["transformer_blocks.0.ff.net.2"] == "excluded by the recipe ('*.ff.*')"
    for sparsity, message in (
        (Sparsity(exclude=("*.atn.*",)), "matches no linear"),
        (Sparsity(include=("proj_out",)), "No linear would become sparse"),
        (Sparsity(operand={"*": "none"}), "No linear would become sparse"),
        (
            Sparsity(operand={"*.f.*": "weight"}),
            r"sparsity.operand: '\*.f.\*' matches no linear of this model.",
        ),
    ):
        with pytest.raises(InputError, match=message):
            select(groups, sparsity)


def test_operands_split_groups_and_the_first_glob_counts() -> None:
    sparsity = Sparsity(
        operand={
            "*.proj_mlp": "weight", "*.add_*": "none", "single_*.to_k": "weight", "*_k": "none", "*": "activation",
        }
    )  # fmt: skip
    groups = tiny_groups()
    plan = select(groups, sparsity)
    split = [group for group in plan.groups if group.name == "single_transformer_blocks.0.proj_mlp"]
    assert {group.operand: [linear.path.split(".")[-1] for linear in group.linears] for group in split} == {
        "activation": ["to_q", "to_v"],
        "weight": ["proj_mlp", "to_k"],
    }
    decisions = {decision.linear.path: decision for decision in plan.decisions}
    assert decisions["transformer_blocks.0.attn.to_k"].reason == "operand none by the recipe ('*_k')"
    assert (
        decisions["transformer_blocks.0.attn.add_q_proj"].reason == "operand none by the recipe ('*.add_*')"
    )
    assert decisions["transformer_blocks.0.ff.net.2"].operand == "activation"
    assert decisions["proj_out"].operand == "none"
    names = [one.name for one in measurements(plan)]
    assert len(names) == len(set(names)), "one tensor is calibrated once, whatever its readers' operands"


def test_one_operand_for_all() -> None:
    groups = tiny_groups()
    activations, weights = (
        select(groups, Sparsity(operand=operand)).groups for operand in ("activation", "weight")
    )
    assert {group.operand for group in activations} == {"activation"}
    assert {group.operand for group in weights} == {"weight"}
    assert [group.linears for group in weights] == [group.linears for group in activations]


def test_weights_need_channels_in_whole_steps_of_64() -> None:
    group = LinearGroup("fc", (Linear("fc", 80, 64, True, None), Linear("other", 80, 64, True, None)), 8)
    plan = select((group,), Sparsity(operand={"fc": "weight", "other": "activation"}))
    assert [(d.operand, d.reason) for d in plan.decisions] == [
        ("none", "K = 80 is not divisible by 64, as the weight operand needs it"),
        ("activation", "operand activation by the recipe ('other')"),
    ]


def test_groups_are_the_linears_that_read_one_tensor() -> None:
    groups = {
        group.name: [linear.path.split(".", 2)[2] for linear in group.linears]
        for group in tiny_groups()
        if group.linears[0].refusal is None
    }
    assert groups["transformer_blocks.0.attn.to_q"] == ["attn.to_q", "attn.to_k", "attn.to_v"]
    assert groups["single_transformer_blocks.0.proj_mlp"] == [
        "proj_mlp",
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
    ]
    assert groups["transformer_blocks.0.ff.net.2"] == ["ff.net.2"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "compare: {max_layer_eror: 0.1}",
            "unknown key 'compare.max_layer_eror'. Did you mean 'max_layer_error'?",
        ),
        ("compare: {max_layer_error: -1}", "'compare.max_layer_error' is wrong"),
        ("compare: {metric: os.system}", "'compare.metric' is wrong"),
        ("compare: {min_metric: {a: much}}", "'compare.min_metric.a' is wrong"),
        ("compare: {samples: 0}", "'compare.samples' is wrong"),
    ],
)
def test_wrong_limits(tmp_path: Path, section: str, message: str) -> None:
    assert message in _error(tmp_path, RECIPE + section + "\n")


def test_limits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + "compare: {min_psnr: 30, metric: a.b:c, min_metric: {x: 1}}\n")
    limits = load_recipe(path).compare
    assert (limits.min_psnr, limits.metric, limits.min_metric, limits.max_layer_error) == (
        30,
        "a.b:c",
        {"x": 1},
        None,
    )


@pytest.mark.parametrize(
    ("sections", "limit"),
    [
        ("", ("max_output_error", 0.015)),
        ("budget: {}", ("max_output_error", 0.015)),
        ("budget: {max_output_error: 0.01}", ("max_output_error", 0.01)),
        ("budget: {min_psnr: 35}", ("min_psnr", 35.0)),
        ("budget: {min_speed: 2}", ("min_speed", 2.0)),
        ("budget: false", None),
        ("budget: 'off'", None),
        ("sparsity: {operand: {'*.ff.*': weight}}\nbudget: {min_speed: 1.5}", ("min_speed", 1.5)),
    ],
)
def test_budgets(tmp_path: Path, sections: str, limit: tuple[str, float] | None) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("budget: false\n", "") + sections + "\n")
    budget = load_recipe(path).budget
    assert (budget and budget.limit) == limit


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            "budget: {max_eror: 0.1}",
            "unknown key 'budget.max_eror'. Did you mean 'max_output_error'?",
        ),
        ("budget: {max_output_error: 1.5}", "'budget.max_output_error' is wrong"),
        ("budget: {min_speed: 0.5}", "'budget.min_speed' is wrong"),
        ("budget: {max_output_error: 0.1, min_speed: 2}", "give one of max_output_error and min_speed"),
        ("budget: 0.02", "'budget' is wrong: it should be a section"),
        ("sparsity: {operand: weight}\nbudget: {min_psnr: 35}", "the recipe fixes what is 2:4"),
        ("sparsity: {method: paper}\nbudget: {}", "set operand: auto, or remove 'budget'"),
    ],
)
def test_wrong_budgets(tmp_path: Path, sections: str, message: str) -> None:
    text = RECIPE.replace("budget: false\n", "") + sections + "\n"
    assert message in _error(tmp_path, text)


def test_a_budget_needs_gradients_or_a_pipeline(tmp_path: Path) -> None:
    onnx = "model:\n  onnx: model.onnx\ncalibration: {recording: calls}\n"
    assert "no gradients to tell its output" in _error(tmp_path, onnx + "budget: {min_speed: 2}\n")
    recorded = "model:\n  source: model\ncalibration: {recording: calls}\n"
    assert "a recording has no pipeline" in _error(tmp_path, recorded + "budget: {min_psnr: 35}\n")


def test_a_recipe_without_prompts_has_those_of_the_package(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  source: model\n")
    prompts = Path(load_recipe(path).calibration.prompts or "")
    assert prompts == DEFAULT_PROMPTS and len(read(prompts)) == COUNT
    assert prompts.read_text().splitlines() == default_prompts()  # as the script writes them


def test_a_model_without_a_pipeline_needs_recorded_calls(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  onnx: model.onnx\n")
    with pytest.raises(InputError, match="no pipeline needs .recording. here"):
        load_recipe(path)


def test_tuning_is_left_to_us_or_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for line, tune, minutes in (
        ("", "auto", 15.0),
        ("compensation: {tune: false, minutes: 3}\n", "off", 3.0),
        ("compensation: {tune: 'off'}\n", "off", 15.0),
        ("compensation: {tune: blockwise, minutes: 0.5}\n", "blockwise", 0.5),
    ):
        path.write_text("model: {source: model}\n" + line)
        found = load_recipe(path).compensation
        assert (found.tune, found.minutes) == (tune, minutes)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{tune: true}", "'compensation.tune' is wrong"),
        ("{minutes: 0}", "'compensation.minutes' is wrong"),
        (f"{{minutes: 1{'0' * 400}}}", "'compensation.minutes' is wrong: it should be a number"),
        ("{steps: 0}", "'compensation.steps' is wrong"),
    ],
)
def test_wrong_tuning(tmp_path: Path, section: str, message: str) -> None:
    assert message in _error(tmp_path, f"model: {{source: model}}\ncompensation: {section}\n")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{source: a, scal: 2}", "unknown key 'model.loras.0.scal'. Did you mean 'scale'?"),
        ("{source: a, module: b:C}", "unknown key 'model.loras.0.module'. Known keys here: source,"),
        ("{scale: 2}", "the key 'model.loras.0.source' is missing"),
        ("a.safetensors", "'model.loras.0' is wrong: it should be a section"),
    ],
)
def test_wrong_loras(tmp_path: Path, lora: str, message: str) -> None:
    assert message in _error(tmp_path, f"model:\n  source: model\n  loras:\n  - {lora}\n")


def test_errors_decide_where_they_can(tmp_path: Path) -> None:
    path, source = tmp_path / "r.yaml", "model: {source: a/b}\n"
    onnx = "model: {onnx: a.onnx}\ncalibration: {recording: calls}\n"
    for text, decide in (
        (source, True),
        (source + "budget: false\n", False),
        (source + "sparsity: {method: magnitude, operand: weight}\n", False),
        (onnx, False),
    ):
        path.write_text(text)
        assert (load_recipe(path).judge is not None) == decide, text


def test_an_onnx_model_cannot_be_tuned(tmp_path: Path) -> None:
    onnx = "model: {onnx: a.onnx}\ncalibration: {recording: calls}\n"
    (tmp_path / "r.yaml").write_text(onnx)
    assert load_recipe(tmp_path / "r.yaml").compensation.tune == "auto"
    assert "no gradients to tune by" in _error(tmp_path, onnx + "compensation: {tune: blockwise}\n")
