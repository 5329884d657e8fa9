# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile bench --model NAME``: one denoising step of a whole model, on this GPU.

Beside each other, in turns and steady: the transformer in bf16 with merged q, k and v; in FP8 as torch has it,
row-wise, x rounded by the compiler's own kernels; and with this project's linears: 2:4 weights in bf16, dense FP8, and
2:4 weights in FP8. All of them by regional ``torch.compile`` (``compile_repeated_blocks``, fullgraph, static shapes),
one CUDA graph a step, on the attention that is fastest here. Weights are random: speed does not depend on them,
pictures would.

Before it is timed, every op is held against its definition in float64 on tensors out of the running model, and every
kind of block compiled against itself in eager mode. A model that does not fit with all its forms at once has them
measured one by one beside the dense one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lynx_compile.errors import InputError, StageError
from lynx_compile.files.atomic import save_text
from lynx_compile.ops.fp8 import Rounded, round_rows
from lynx_compile.tools.full_size import MODELS, FullSize, build, step
from lynx_compile.tools.model_forms import (
    FORMS,
    DenseLinear,
    Forms,
    TorchFp8Linear,
    merge_dense,
    observe,
    weight_bytes,
)
from lynx_compile.tools.timing import captured, file_name, quantiles, take_long_turns, take_turns
from lynx_compile.torch_ops.definitions import COMPILED, definition
from lynx_compile.torch_ops.readers import Merged

CHECKED_ROWS = 64
TOLERANCE = (
    2.0**-7
)  # of an op against float64 on its own operands: y's rounding to bf16, and the tensor cores' sums
# Of what a compiled block adds, against the block in eager mode: a compiler rounds less often in between; where x is
# rounded to e4m3 behind that, a last bit more or less of bf16 becomes one of e4m3.
BLOCK_TOLERANCE = {"bf16_dense": 2.0**-5, "bf16_weight": 2.0**-5}
FP8_BLOCK_TOLERANCE = 2.0**-3
ROOM = 0.85  # of the GPU's memory, for weights of all forms together
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class FormResult:
    """One form of a model: milliseconds a step, ratios over the dense form in the same rounds and steady.

    ``ms_low``, ``ms_high``: 10th and 90th percentile. ``weights_gib``: of the whole transformer. ``peak_gib``: most
    memory of a step with this form alone. ``op_error``: largest relative error of an op against float64.
    ``block_error``: of what a compiled block adds, against eager. ``output_difference``: of the step's result from the
    dense one, with random weights.
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


@dataclass(frozen=True)
class ModelResult:
    """All forms of one model. ``together``: whether they took turns all together, or each with the dense one.

    ``inductor``: options that the compiler was given, for all forms.
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


def bench_model(
    model: FullSize,
    *,
    forms: Sequence[str] = FORMS,
    rounds: int = 10,
    attention: str | None = None,
    device: str = "cuda",
    inductor: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
    **options: bool,
) -> ModelResult:
    """Measure ``forms`` of ``model`` in bf16 on the current GPU; the dense one is always among them.

    Args:
        attention: "flash" or "cudnn"; the faster one by default.
        inductor: options of the compiler, for all forms.
        options: of ``Fp8Linear``, for comparisons.

    Raises:
        InputError: there is no GPU, or the plugin library cannot be used. StageError: a result is wrong.
    """
    if not torch.cuda.is_available():
        raise InputError("There is no GPU here to measure a model on.", "Run it on a machine with one.")
    import diffusers

    others = [form for form in FORMS if form in forms and form != "bf16_dense"]
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # the forms are variants of the same blocks' code
    dense = build(model, device)
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    call = {**step(model, device), "return_dict": False}
    log(f"{model.name}: built, {parameters / 1e9:.2f} B parameters")
    observed = observe(dense, call)
    merge_dense(dense, observed)
    _collect()
    chosen = attention or _fastest_attention(observed.calls, dense)
    log(f"attention: {chosen}")
    together = _fits(dense, others)
    batches = [others] if together else _pairs(others)
    settings = dict(inductor or {})
    maker, results = Forms(dense), dict[str, FormResult]()
    with torch.no_grad(), sdpa_kernel(ATTENTION[chosen]):
        steps: dict[str, _Step] = {
            "bf16_dense": _Step("bf16_dense", dense, call, observed.calls, settings, log)
        }
        for batch in batches:
            for form in batch:
                made = maker.make(form, **(options if form.startswith("fp8") else {}))
                steps[form] = _Step(form, made, call, observed.calls, settings, log)
                del made
            maker.release()
            results |= _timed(steps, rounds, keep=results)
            for form in batch:
                del steps[form]
            _collect()
    return ModelResult(
        model.name, model.class_name, parameters, chosen, together, results, torch.cuda.get_device_name(),
        torch.__version__, diffusers.__version__, datetime.date.today().isoformat(),
        settings,
    )  # fmt: skip


class _Step:
    """A form that has been checked, compiled and captured."""

    def __init__(
        self,
        form: str,
        module: nn.Module,
        call: dict[str, Any],
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]],
        inductor: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self.form, self.module = form, module
        self.weights = weight_bytes(module)
        began = time.perf_counter()
        eager, self.op_error = _check_ops(form, module, calls)
        log(
            f"{form}: ops checked in {time.perf_counter() - began:.0f} s, largest error {self.op_error or 0:.2e}"
        )
        began = time.perf_counter()
        module.compile_repeated_blocks(fullgraph=True, dynamic=False, options=inductor or None)  # type: ignore[operator]
        self.block_error = _check_blocks(form, module, calls, eager)
        del eager
        self.output = _first(module(**call)).float()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        log(f"{form}: compiled in {seconds:.0f} s, blocks differ from eager by {self.block_error:.2e}")
        self.peak = _peak(lambda: module(**call)) + self.weights
        self.replay = captured(lambda: module(**call))


def _timed(steps: dict[str, _Step], rounds: int, keep: dict[str, FormResult]) -> dict[str, FormResult]:
    """Results of ``steps``; the dense one's of an earlier batch stays, its ratios are 1 anyway."""
    replays = {form: step.replay for form, step in steps.items()}
    times = take_turns(replays, rounds, 1)
    steady = take_long_turns(replays, 1)
    dense, results = steps["bf16_dense"], {}
    for form, each in steps.items():
        if form in keep:
            continue
        ratios = [d / s for d, s in zip(times["bf16_dense"], times[form], strict=True)]
        median, low, high = quantiles(times[form])
        difference = (each.output - dense.output).norm() / dense.output.norm()
        results[form] = FormResult(
            ms=median / 1000, ms_low=low / 1000, ms_high=high / 1000, ratio=statistics.median(ratios),
            steady_ratio=steady["bf16_dense"] / steady[form], steady_ms=steady[form] / 1000,
            weights_gib=each.weights / 2**30, peak_gib=each.peak / 2**30, op_error=each.op_error,
            block_error=each.block_error, output_difference=float(difference),
        )  # fmt: skip
    return results


def _check_ops(
    form: str, module: nn.Module, calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
) -> tuple[dict[str, torch.Tensor], float | None]:
    """What the first block of each kind gives in eager mode, and the largest error of a product in it.

    Raises:
        StageError: one exceeds what rounding explains.
    """
    outputs, errors = {}, []
    for path, (args, kwargs) in calls.items():
        block = module.get_submodule(path)
        seen: list[tuple[nn.Module, torch.Tensor, list[torch.Tensor]]] = []
        with _recorded(block, seen):
            outputs[path] = _joined(block(*args, **kwargs))
        for linear, x, parts in seen:
            if isinstance(linear, DenseLinear) and not isinstance(linear, TorchFp8Linear):
                continue  # cuBLAS
            rows = torch.linspace(0, len(x) - 1, min(CHECKED_ROWS, len(x)), device=x.device).long()
            wanted = _definition(linear, x[rows])
            found = torch.cat([part.flatten(0, -2) for part in parts], -1)[rows].double()
            errors.append(float((found - wanted).norm() / wanted.norm()))
            if not errors[-1] < TOLERANCE:
                raise StageError(
                    "bench",
                    f"{form}, {path}: a product of {tuple(x.shape)} is off by {errors[-1]:.2e} of its norm.",
                    "Do not use this build on this GPU; please report it with the GPU's name.",
                )
    return outputs, max(errors, default=None)


@contextlib.contextmanager
def _recorded(
    block: nn.Module, seen: list[tuple[nn.Module, torch.Tensor, list[torch.Tensor]]]
) -> Iterator[None]:
    """Every product in ``block``: its module, x [M, K], and the parts of its result."""
    merged = {id(each.linear): each.linear for each in block.modules() if isinstance(each, Merged)}
    for linear in merged.values():

        def parts(x: torch.Tensor, sizes: list[int], linear: Any = linear) -> list[torch.Tensor]:
            found: list[torch.Tensor] = type(linear).parts(linear, x, sizes)
            seen.append((linear, x.reshape(-1, x.shape[-1]), found))
            return found

        linear.parts = parts
    try:
        yield
    finally:
        for linear in merged.values():
            del linear.__dict__["parts"]


def _definition(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """The product of some rows in float64, by what the module holds."""
    if isinstance(linear, COMPILED):
        return definition(linear, x)
    weight = Rounded(linear.weight, linear.weight_scale).dequantized(torch.float64)
    y = round_rows(x).dequantized(torch.float64) @ weight.T
    y = y if linear.bias is None else y + linear.bias.double()
    return torch.cat(
        (y[:, : linear.gelu_from], functional.gelu(y[:, linear.gelu_from :], approximate="tanh")), 1
    )


def _check_blocks(
    form: str,
    module: nn.Module,
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]],
    eager: dict[str, torch.Tensor],
) -> float:
    """The largest relative difference of what a compiled block adds from what it adds in eager mode.

    Raises:
        StageError: it exceeds what rounding explains.
    """
    errors = []
    for path, (args, kwargs) in calls.items():
        found = _joined(module.get_submodule(path)(*args, **kwargs))
        added = eager[path] - _residual(args, kwargs, eager[path])
        errors.append(float((found - eager[path]).norm() / added.norm()))
        if not errors[-1] < BLOCK_TOLERANCE.get(form, FP8_BLOCK_TOLERANCE):
            raise StageError(
                "bench",
                f"{form}, {path}: compiled, it differs by {errors[-1]:.2e} of what it adds.",
                "Do not use this build on this GPU; please report it with the GPU's name.",
            )
    return max(errors)


def _joined(output: Any) -> torch.Tensor:
    tensors = (
        [output] if isinstance(output, torch.Tensor) else [t for t in output if isinstance(t, torch.Tensor)]
    )
    return torch.cat([tensor.float() for tensor in tensors], 1)


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """What a block adds to: its inputs of that many channels, in the order that gives its output's tokens."""
    names = [
        kwargs[name] for name in ("encoder_hidden_states", "hidden_states") if kwargs.get(name) is not None
    ]
    inputs = names or [next(t for t in args if isinstance(t, torch.Tensor))]
    joined = torch.cat([t.float() for t in inputs], 1)
    return joined if joined.shape == output.shape else torch.zeros_like(output)


def _fastest_attention(calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]], module: nn.Module) -> str:
    """By one block's time in eager mode."""
    path, (args, kwargs) = next(iter(calls.items()))
    block, works = module.get_submodule(path), {}
    with torch.no_grad():
        for name, backend in ATTENTION.items():
            try:
                with sdpa_kernel(backend):
                    works[name] = captured(lambda: block(*args, **kwargs))
            except RuntimeError:
                continue  # not on this GPU, or not for this size
        times = take_turns(works, 5, 1)
    return min(times, key=lambda name: statistics.median(times[name]))


def _fits(dense: nn.Module, forms: Sequence[str]) -> bool:
    """Whether the weights of all ``forms`` lie beside the dense ones and leave room to run."""
    linears = sum(each.weight.numel() for each in _dense_linears(dense))
    per_weight = {"bf16_weight": 9 / 8, "fp8_weight": 5 / 8, "torch_fp8": 1.0, "fp8_dense": 1.0}
    shared = 1.0 if {"torch_fp8", "fp8_dense"} <= set(forms) else 0.0
    need = weight_bytes(dense) + linears * (sum(per_weight[form] for form in forms) - shared)
    return bool(need < ROOM * torch.cuda.get_device_properties(0).total_memory)


def _dense_linears(module: nn.Module) -> list[DenseLinear]:
    return [each for each in module.modules() if isinstance(each, DenseLinear)]


def _pairs(forms: Sequence[str]) -> list[list[str]]:
    """The two that share weights together, every other one alone."""
    shared = [form for form in forms if form in ("torch_fp8", "fp8_dense")]
    return [*([shared] if shared else []), *([form] for form in forms if form not in shared)]


def _peak(work: Callable[[], object]) -> int:
    """Bytes that ``work`` takes besides what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _first(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def _collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()


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
    old = json.loads(summary.read_text()) if summary.exists() else {}
    for form, each in models[result.model]["forms"].items():
        if form == "bf16_dense":
            old[f"step.{result.model}.dense_ms"] = round(each["ms"], 2)
        else:
            old[f"step.{result.model}.{form}"] = round(each["ratio"], 3)
            old[f"step.{result.model}.{form}.steady"] = round(each["steady_ratio"], 3)
    save_text(summary, json.dumps(old | {"device": result.device, "date": result.date}, indent=1) + "\n")
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    save_text(table, markdown(models))
    _draw(models, picture)
    return [path, summary, table, picture]


def markdown(models: dict[str, Any]) -> str:
    """All models as a table."""
    lines = [
        "One denoising step, 1024x1024 pixels, batch 1, random weights; regional torch.compile and one CUDA graph.",
        "",
        "| model | form | ms | over bf16, in turns | steady | weights, GiB | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        for form in (form for form in FORMS if form in model["forms"]):
            f = model["forms"][form]
            lines.append(
                f"| {name} | {TITLES[form]} | {f['ms']:.1f} | {f['ratio']:.2f}x | {f['steady_ratio']:.2f}x "
                f"| {f['weights_gib']:.1f} | {f['peak_gib']:.1f} |"
            )
    return "\n".join(lines) + "\n"


TITLES = {
    "bf16_dense": "bf16, dense",
    "torch_fp8": "FP8 by torch, row-wise",
    "bf16_weight": "bf16, 2:4 weights",
    "fp8_dense": "FP8, dense",
    "fp8_weight": "FP8, 2:4 weights",
}
COLORS = {
    "torch_fp8": "#9aa5b1",
    "bf16_weight": "#e0a33b",
    "fp8_dense": "#7fb069",
    "fp8_weight": "#2a6fb0",
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
    names = [f"{name}\n{model['forms']['bf16_dense']['ms']:.0f} ms in bf16" for name, model in models.items()]
    axes.set_yticks(range(len(models)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("a step: times as fast as bf16, compiled")
    axes.set_title(f"{next(iter(models.values()))['device']}: whole models", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def line(name: str, form: str, result: FormResult) -> str:
    """One form for people."""
    return (
        f"{name:<12} {TITLES[form]:<24} {result.ms:7.2f} ms ({result.ms_low:.2f}-{result.ms_high:.2f})  "
        f"{result.ratio:.3f}x, {result.steady_ratio:.3f}x steady  weights {result.weights_gib:.1f} GiB, "
        f"peak {result.peak_gib:.1f} GiB  differs by {result.output_difference:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="One denoising step of whole models, on this GPU.")
    parser.add_argument("folder", type=Path, help="where the results go, beside those that are there")
    parser.add_argument(
        "--model", action="append", choices=[model.name for model in MODELS], help="default: all"
    )
    parser.add_argument("--form", action="append", choices=FORMS, help="default: all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--attention", choices=list(ATTENTION), help="default: the faster one")
    parser.add_argument(
        "--own-pass", action="store_true", help="round x in our pass, not in the compiler's kernels"
    )
    parser.add_argument(
        "--inductor", action="append", default=[], metavar="KEY=VALUE",
        help="an option of the compiler for all forms, the value in JSON: triton.multi_kernel=1",
    )  # fmt: skip
    arguments = parser.parse_args()
    inductor = {key: json.loads(value) for key, value in (each.split("=", 1) for each in arguments.inductor)}
    names = arguments.model or [model.name for model in MODELS]
    options: dict[str, Any] = {"fused_rounding": False} if arguments.own_pass else {}
    for model in (model for model in MODELS if model.name in names):
        result = bench_model(
            model, forms=arguments.form or FORMS, rounds=arguments.rounds, attention=arguments.attention,
            inductor=inductor,
            log=lambda text: print(text, flush=True), **options,
        )  # fmt: skip
        for form, each in result.forms.items():
            print(line(model.name, form, each), flush=True)
        print("wrote", *save(result, arguments.folder), flush=True)
        _collect()


if __name__ == "__main__":
    main()
