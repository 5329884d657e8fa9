# SPDX-License-Identifier: Apache-2.0
"""The commands without compiling: the group, ``init``, ``--set``, ``--device``, and how they speak."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lynx_compile import cli
from lynx_compile.cli import console, display
from lynx_compile.errors import InputError
from lynx_compile.models import place
from lynx_compile.recipe import Recipe, load_recipe
from tests.conftest import RECIPE

COMMANDS = ["compile", "init", "check", "inspect", "compare", "report", "study", "bench"]


@pytest.fixture(autouse=True)
def _own_manner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.manner, "progress", console.Shown.auto)
    monkeypatch.setattr(console.manner, "quiet", False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lynx-compile", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_help_shows_every_command_and_each_has_examples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    for name in COMMANDS:
        assert run(monkeypatch, name, "--help") == 0
        shown = capsys.readouterr().out
        assert "Example" in shown and "Exit codes" in shown and "lynx-compile" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml", "-o", "x.engine"], "The recipe none.yaml does not exist."),
        (["-o", "x.engine", "none"], "The recipe none does not exist."),
        (["inspct", "x.engine"], "There is no command or recipe 'inspct'. Did you mean 'inspect'?"),
        (["none.yaml", "-o", "x.engine", "--sets", "a=1"], "No such option: --sets"),
    ],
)
def test_what_is_no_command_is_a_recipe_unless_it_is_nearly_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_shell_completes_commands_and_options_behind_a_recipe() -> None:
    def completed(words: str, number: int) -> list[str]:
        asked = {"_LYNX_COMPILE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        command = [sys.executable, "-m", "lynx_compile"]
        return subprocess.run(
            command, env=os.environ | asked, capture_output=True, text=True, check=True
        ).stdout.split()

    assert completed("lynx-compile in", 1) == ["init", "inspect"]
    assert completed("lynx-compile flux.yaml --pro", 2) == ["--progress"]


def test_init_writes_every_key_at_its_default(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.yaml"
    assert run(monkeypatch, "init", str(tiny / "model"), "-o", str(path)) == 0
    call = {
        "true_cfg_scale": 1.0,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": 512,
    }
    expected = Recipe.model_validate({"model": {"source": str(tiny / "model")}, "call": call})
    assert load_recipe(path) == expected.resolved(tmp_path)
    text = path.read_text()
    described = Recipe.model_fields["call"].description
    assert described and described.split("\n")[0][:60] in text and "\n  # height:" in text
    assert max(map(len, text.splitlines())) <= 110
    assert run(monkeypatch, "init", str(tiny / "model"), "-o", str(path)) == 2
    assert "new.yaml exists already" in capsys.readouterr().err and path.read_text() == text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/tiny", "The model 'nobody/tiny' could not be fetched from the hub"),
        ("./none", "The model folder ./none does not exist"),
        ("https://example.com/x", "source is a URL"),
        (".", "holds neither model_index.json nor config.json"),
    ],
)
def test_init_says_in_one_line_why_there_is_no_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(monkeypatch, "init", model) == 2
    written = capsys.readouterr()
    assert message in written.err and written.err.count("\n") == 1 and not written.out


def test_what_is_set_is_as_if_the_recipe_said_it(tmp_path: Path) -> None:
    path, said = tmp_path / "r.yaml", tmp_path / "said.yaml"
    path.write_text(RECIPE)
    said.write_text(
        RECIPE.replace("samples: 6", "samples: 64")
        .replace("prompts.safetensors", "other.csv")
        .replace("budget: false", "budget: {min_psnr: 30}")
        + "sparsity: {operand: {'*.ff.*': weight, '*': auto}}\n"
    )
    settings = [
        "calibration.samples=7",
        "calibration.samples=64",
        "calibration.prompts=other.csv",
        "budget.min_psnr=30",
        "sparsity.operand={'*.ff.*': weight, '*': auto}",
    ]
    found = load_recipe(path, settings)
    assert found == load_recipe(said) and found.digest == load_recipe(said).digest


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "calibration.sampels=3",
            "--set calibration.sampels=3: unknown key 'calibration.sampels'. Did you mean 'sam",
        ),
        ("sampels=3", "--set sampels=3: unknown key 'sampels'"),
        ("calibration.samples=many", "--set calibration.samples=many: 'calibration.samples' is wrong"),
        ("calibration.samples", "--set calibration.samples: this names no key and value"),
        ("calibration.samples.x=3", "--set calibration.samples.x=3: 'samples' has no keys of its own"),
        ("calibration.seed=010", "--set calibration.seed=010:1: 010 can be read as more than one number"),
        ("sparsity.operand={", "--set sparsity.operand={:1: this is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, setting: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "r.yaml", [setting])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "gpu is no device"), ("cuda:x", "cuda:x is no device"), ("cuda:97", "there is no such GPU")],
)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InputError, match=message):
        place.choose(device)


def test_the_second_of_the_visible_gpus_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr("lynx_compile.engine.trt.gpu", lambda: "sm90")
    place.choose("cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_the_cpu_may_be_chosen_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(place, "_on_cpu", False)
    assert place.on_gpu()
    place.choose("cpu")
    assert not place.on_gpu()


def test_programs_get_a_line_of_json_for_every_step_and_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "EVENT_EVERY_S", 0.0)
    console.speak(console.Shown.json)
    with display.stage("calibrate") as progress:
        for done in range(4):
            progress("calls", done, 4)
    with suppress(InputError), display.stage("build") as progress:
        progress("Building engine", 1, 6)
        raise InputError("Wrong.", "Correct it.")
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [one["event"] for one in found] == ["start", *["update"] * 4, "done", "start", "update", "failed"]
    assert [one["done"] for one in found] == [0, 0, 1, 2, 3, 4, 0, 1, 1]
    assert found[4] | {"elapsed_s": 0, "remaining_s": 0} == {
        "event": "update", "stage": "calibrate", "what": "calls", "done": 3, "total": 4, "elapsed_s": 0,
        "remaining_s": 0,
    }  # fmt: skip
    assert found[4]["remaining_s"] is not None and found[0]["remaining_s"] is None
    arguments = [str(tiny / "tiny.yaml"), "-o", str(tmp_path / "x.engine"), "--set", "engine.plugin=none.so"]
    assert run(monkeypatch, *arguments, "--progress", "json") == 2
    (error,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (
        error["event"] == "error" and error["exit_code"] == 2 and "none.so does not exist" in error["message"]
    )
    assert Path(error["log"]) == tmp_path / "x.log" and "none.so" in (tmp_path / "x.log").read_text()
    assert run(monkeypatch, *arguments, "-q") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: The plugin library") and shown.endswith(f"The log is {error['log']}.\n")


def test_without_a_terminal_there_are_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> list[str]:
        with display.stage("tune") as progress:
            for done in (*range(4), *range(1, 3)):  # the second count begins anew
                progress("steps at blocks.0", done, 4)
        return capsys.readouterr().err.splitlines()

    assert work() == ["tune: started", "tune: done, steps at blocks.0 4/4, 0:00"]
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.0)
    lines = work()
    assert len(lines) == 2 + 6 and lines[1] == "tune: steps at blocks.0 0/4, 0:00 so far"
    assert re.fullmatch(r"tune: steps at blocks.0 3/4, [\d.]+/s, 0:0\d so far, 0:0\d left", lines[4])
    console.speak(quiet=True)
    assert work() == []
