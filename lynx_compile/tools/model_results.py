# SPDX-License-Identifier: Apache-2.0
"""What ``bench --model`` found: as JSON beside what is there, as a table, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lynx_compile.files.atomic import save_text
from lynx_compile.tools.model_forms import FORMS_AND_PLAN
from lynx_compile.tools.summary import add
from lynx_compile.tools.timing import file_name

FULL_SIZE = "1024x1024 pixels, 512 text tokens, batch 1, random weights"  # of results that do not say it


@dataclass(frozen=True)
class FormResult:
    """One form of a model: milliseconds a step, ratios over the dense form in the same rounds and steady.

    ``ms_low``, ``ms_high``: 10th and 90th percentile. ``weights_gib``: of the whole transformer. ``peak_gib``: most
    memory of a step with this form alone. ``op_error``: largest relative error of an op against float64.
    ``block_error``: of what a compiled block adds, against eager. ``output_difference``: of the step's result from the
    dense one, with weights that are pruned by magnitude. ``same_as``: the form whose figures these are, where the plan
    gives that one to every linear.
    """

    ms: float
    ms_low: float
    ms_high: float
    ratio: float
    steady_ratio: float
    steady_ms: float
    weights_gib: float
    peak_gib: float
    op_error: float | None
    block_error: float
    output_difference: float
    same_as: str | None = None


@dataclass(frozen=True)
class ModelResult:
    """All forms of one model. ``together``: whether they took turns all together, or each with the dense one.

    ``what``: size of the call, and whose weights. ``plan``: how many linears the plan gives each form. ``cuda_graph``:
    whether a step is one. ``inductor``: options that the compiler was given, for all forms.
    """

    model: str
    class_name: str
    parameters: int
    attention: str
    together: bool
    forms: dict[str, FormResult]
    device: str
    torch: str
    diffusers: str
    date: str
    inductor: dict[str, Any]
    dtype: str = "bf16"
    what: str = FULL_SIZE
    plan: dict[str, int] = field(default_factory=dict)
    cuda_graph: bool = True


def save(result: ModelResult, folder: Path) -> list[Path]:
    """Add ``result`` to ``DEVICE-model.json`` and its ratios to ``summary.json`` in ``folder``, and draw all anew.

    Forms of an earlier run that this one did not measure stay.
    """
    path = folder / f"{file_name(result.device)}-model.json"
    models = json.loads(path.read_text()) if path.exists() else {}
    earlier = models.get(result.model, {}).get("forms", {})
    models[result.model] = asdict(result)
    models[result.model]["forms"] = {**earlier, **models[result.model]["forms"]}
    save_text(path, json.dumps(models, indent=1) + "\n")
    summary = folder / "summary.json"
    found: dict[str, float | str] = {}
    for form, each in models[result.model]["forms"].items():
        if form == "bf16_dense":
            found[f"step.{result.model}.dense_ms"] = round(each["ms"], 2)
        else:
            found[f"step.{result.model}.{form}"] = round(each["ratio"], 3)
            found[f"step.{result.model}.{form}.steady"] = round(each["steady_ratio"], 3)
    add(found | {"device": result.device, "date": result.date}, summary)
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    save_text(table, markdown(models))
    _draw(models, picture)
    return [path, summary, table, picture]


def markdown(models: dict[str, Any]) -> str:
    """All models as a table."""
    lines = [
        "One denoising step; regional torch.compile and one CUDA graph.",
        "",
        "| model | form | ms | over dense, in turns | steady | weights, GiB | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        for form in (form for form in FORMS_AND_PLAN if form in model["forms"]):
            f = model["forms"][form]
            lines.append(
                f"| {name} | {title(form, model)} | {f['ms']:.1f} | {f['ratio']:.2f}x | {f['steady_ratio']:.2f}x "
                f"| {f['weights_gib']:.1f} | {f['peak_gib']:.1f} |"
            )
    lines += ["", *(f"- {name}: {model.get('what', FULL_SIZE)}" for name, model in models.items())]
    return "\n".join(lines) + "\n"


def title(form: str, model: Mapping[str, Any]) -> str:
    """A form for people; of a plan, what it mixes."""
    if form == "plan":
        mixed = ", ".join(f"{count} {words}" for words, count in model.get("plan", {}).items())
        return f"the plan ({mixed})" if mixed else "the plan"
    return TITLES[form].replace("bf16", model.get("dtype", "bf16"))


TITLES = {
    "bf16_dense": "bf16, dense",
    "torch_fp8": "FP8 by torch, row-wise",
    "bf16_weight": "bf16, 2:4 weights",
    "fp8_dense": "FP8, dense",
    "fp8_weight": "FP8, 2:4 weights",
    "plan": "the plan",
}
COLORS = {
    "torch_fp8": "#9aa5b1",
    "bf16_weight": "#e0a33b",
    "fp8_dense": "#7fb069",
    "fp8_weight": "#2a6fb0",
    "plan": "#8d5fa8",
}


def _draw(models: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.9 * len(models) + 1.8), layout="constrained")
    height = 0.8 / len(COLORS)
    for number, (form, color) in enumerate(COLORS.items()):
        ratios = [model["forms"].get(form, {}).get("ratio", 0.0) for model in models.values()]
        at = [row + (number - len(COLORS) / 2 + 0.5) * height for row in range(len(models))]
        bars = axes.barh(at, ratios, height * 0.92, label=TITLES[form], color=color)
        axes.bar_label(bars, [f"{ratio:.2f}x" if ratio else "" for ratio in ratios], padding=3, fontsize=8)
    names = [f"{name}\n{model['forms']['bf16_dense']['ms']:.0f} ms dense" for name, model in models.items()]
    axes.set_yticks(range(len(models)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("a step: times as fast as dense in 16 bits, compiled")
    axes.set_title(f"{next(iter(models.values()))['device']}: whole models", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def line(result: ModelResult, form: str) -> str:
    """One form for people."""
    found = result.forms[form]
    return (
        f"{result.model:<12} {title(form, asdict(result)):<24} {found.ms:7.2f} ms "
        f"({found.ms_low:.2f}-{found.ms_high:.2f})  {found.ratio:.3f}x, {found.steady_ratio:.3f}x steady  "
        f"weights {found.weights_gib:.1f} GiB, peak {found.peak_gib:.1f} GiB  differs by {found.output_difference:.3f}"
        + (f"  as measured of {TITLES[found.same_as]}" if found.same_as else "")
    )
