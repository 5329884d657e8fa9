# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile bench --model NAME|RECIPE``: one denoising step of a whole model, on this GPU.

Beside each other, in turns and steady: the transformer in 16 bits with merged q, k and v; in FP8 as torch has it,
row-wise, x rounded by the compiler's own kernels; with this project's linears: 2:4 weights in 16 bits, dense FP8, and
2:4 weights in FP8; and what the plan chooses for each linear by speed, or what an engine's plan has chosen. All of them
by regional ``torch.compile`` (fullgraph, static shapes), one CUDA graph a step, on the attention that is fastest here.

Before it is timed, every op is held against its definition in float64 on tensors out of the running model, and every
kind of block compiled against itself in eager mode (``model_checks``). A model that does not fit with all its forms at
once has them measured one by one beside the dense one.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import inspect
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError, StageError, first_line
from lynx_compile.models.structure import find_structure
from lynx_compile.passes.select import select
from lynx_compile.passes.speed_table import DENSE, Form
from lynx_compile.tools.full_size import MODELS, step_model
from lynx_compile.tools.model_checks import check_blocks, check_ops
from lynx_compile.tools.model_forms import (
    FORMS_AND_PLAN,
    NAMES,
    Forms,
    blocks_of,
    dense_linears,
    merge_dense,
    observe,
    weight_bytes,
)
from lynx_compile.tools.model_results import FormResult, ModelResult, line, save
from lynx_compile.tools.step_model import StepModel
from lynx_compile.tools.timing import captured, quantiles, synchronize, take_long_turns, take_turns

ROOM = 0.85  # of the GPU's memory, for weights of all forms together
# The fastest first choice, and what takes its place for calls that it does not serve (masks, odd sizes).
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ANY_ATTENTION = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}

Plan = Mapping[str, Form]


@dataclass(frozen=True)
class Settings:
    """``backend``: of torch.compile, and ``inductor`` its options, for all forms. ``fp8``: options of ``Fp8Linear``.

    ``attention``: "flash" or "cudnn"; None: the faster one.
    """

    rounds: int = 10
    attention: str | None = None
    backend: str = "inductor"
    inductor: Mapping[str, Any] | None = None
    fp8: Mapping[str, bool] | None = None


def bench_model(
    model: StepModel,
    *,
    forms: Sequence[str] = FORMS_AND_PLAN,
    plan: Plan | None = None,
    settings: Settings | None = None,
    device: str = "cuda",
    log: Callable[[str], None] = lambda line: None,
) -> ModelResult:
    """Measure ``forms`` of ``model`` on the current GPU; the dense one is always among them.

    Args:
        plan: the form of every linear that is not left dense; by default what ``planned`` chooses.
        device: "cpu" runs everything with the ops' definitions, and its times mean nothing.

    Raises:
        InputError: there is no GPU, or the plugin library cannot be used. StageError: a result is wrong, or a block
            does not compile whole.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("There is no GPU here to measure a model on.", "Run it on a machine with one.")
    import diffusers

    settings = settings or Settings()
    others = [form for form in FORMS_AND_PLAN if form in forms and form != "bf16_dense"]
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # the forms are variants of the same blocks' code
    dense = model.build(device)
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    call = model.step(device)
    log(f"{model.name}: built, {parameters / 1e9:.2f} B parameters, {model.what}")
    if "plan" in others and plan is None:
        plan = planned(model, dense, call)
    call |= {"return_dict": False} if _has_return_dict(dense) else {}
    observed = observe(dense, call)
    merge_dense(dense, observed)
    _collect()
    maker = Forms(dense, plan, model.sparsity)
    mixture = mixture_of(
        plan or {}, [path for linear in dense_linears(dense) for path in linear.group.linears]
    )
    if "plan" in others:
        log(f"the plan: {', '.join(f'{count} linears {words}' for words, count in mixture.items())}")
    same = maker.uniform() if "plan" in others else None
    if same in ("bf16_dense", *others):
        others.remove("plan")
    else:
        same = None
    chosen = settings.attention or _fastest_attention(observed.calls, dense)
    log(f"attention: {chosen}")
    together = _fits(dense, others, plan or {})
    results: dict[str, FormResult] = {}
    with torch.no_grad(), _attention(chosen):
        steps = {"bf16_dense": _Step("bf16_dense", dense, call, observed.calls, settings, log)}
        graphs = steps["bf16_dense"].is_graph
        for batch in [others] if together else _pairs(others):
            for form in batch:
                options = dict(settings.fp8 or {}) if form.startswith("fp8") else {}
                made = maker.make(form, **options)
                steps[form] = _Step(form, made, call, observed.calls, settings, log)
                graphs = graphs and steps[form].is_graph
                del made
            maker.release()
            results |= _timed(steps, settings.rounds, keep=results)
            for form in batch:
                del steps[form]
            _collect()
    if same is not None:
        results["plan"] = replace(results[same], same_as=same)
    return ModelResult(
        model=model.name, class_name=model.class_name, parameters=parameters, attention=chosen, together=together,
        forms=results, device=torch.cuda.get_device_name() if device == "cuda" else "the CPU",
        torch=torch.__version__, diffusers=diffusers.__version__, date=datetime.date.today().isoformat(),
        inductor=dict(settings.inductor or {}), dtype=WORDS[model.dtype], what=model.what,
        plan=mixture if "plan" in results else {}, cuda_graph=graphs and device == "cuda",
    )  # fmt: skip


def planned(model: StepModel, module: nn.Module, call: Mapping[str, Any]) -> dict[str, Form]:
    """What ``passes.select`` takes for every linear, by speed: on the GPU that is here, else for the recipe's.

    A budget of the recipe's has no say: what an error costs takes a calibration; see ``plan_of``.

    Args:
        module: with weights, or on meta.

    Raises:
        InputError: no linear would change, or the recipe's costs cannot be read.
    """
    here = trt.gpu()
    groups = find_structure(module, call).groups
    plan = select(groups, model.sparsity, (here,) if here else model.gpus)
    return {decision.linear.path: decision.form for decision in plan.decisions}


def plan_of(engine: Manifest) -> dict[str, Form]:
    """The forms that the linears of a compiled engine have."""
    return {path: Form(node.operand, node.fp8) for node in engine.sparse for path in node.linears}


def mixture_of(plan: Plan, linears: Sequence[str]) -> dict[str, int]:
    """How many of the linears have each form, in words."""
    counts = Counter(plan.get(path, DENSE).words for path in linears)
    return dict(counts.most_common())


class _Step:
    """A form that has been checked, compiled and captured."""

    def __init__(
        self,
        form: str,
        module: nn.Module,
        call: dict[str, Any],
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]],
        settings: Settings,
        log: Callable[[str], None],
    ) -> None:
        self.form, self.module = form, module
        self.weights = weight_bytes(module)
        began = time.perf_counter()
        eager, self.op_error = check_ops(form, module, calls)
        log(
            f"{form}: ops checked in {time.perf_counter() - began:.0f} s, largest error {self.op_error or 0:.2e}"
        )
        began = time.perf_counter()
        for block in blocks_of(module).values():
            block.compile(
                fullgraph=True,
                dynamic=False,
                backend=settings.backend,
                options=dict(settings.inductor or {}) or None,
            )
        try:
            self.block_error = check_blocks(form, module, calls, eager)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise StageError(
                "bench",
                f"a block of {type(module).__name__} does not compile whole ({first_line(error)}).",
                "It cannot be measured like this; lynx_compile.apply runs it without torch.compile.",
            ) from None
        del eager
        self.output = _first(module(**call)).float()
        synchronize()
        seconds = time.perf_counter() - began
        log(f"{form}: compiled in {seconds:.0f} s, blocks differ from eager by {self.block_error:.2e}")
        self.peak = _peak(lambda: module(**call)) + self.weights
        self.replay, self.is_graph = _replay(lambda: module(**call), log)


def _replay(work: Callable[[], object], log: Callable[[str], None]) -> tuple[Callable[[], object], bool]:
    """``work`` as a CUDA graph, and that it is one; itself where it asks the GPU for something in between."""
    try:
        return captured(work), True
    except RuntimeError as error:
        synchronize()
        log(f"no CUDA graph, so that launches count: {first_line(error)}")
        return work, False


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


def _has_return_dict(module: nn.Module) -> bool:
    return "return_dict" in inspect.signature(module.forward).parameters


def _attention(name: str) -> AbstractContextManager[None]:
    if name == "any":
        return nullcontext()
    chosen: AbstractContextManager[None] = sdpa_kernel([ATTENTION[name], *ANY_ATTENTION], set_priority=True)
    return chosen


def _fastest_attention(calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]], module: nn.Module) -> str:
    """By one block's time in eager mode; "any" where torch is to choose."""
    path, (args, kwargs) = next(iter(calls.items()))
    block, works = module.get_submodule(path), {}
    if not torch.cuda.is_available():
        return "any"
    with torch.no_grad():
        for name, backend in ATTENTION.items():
            try:
                with sdpa_kernel(backend):
                    works[name] = captured(lambda: block(*args, **kwargs))
            except RuntimeError:
                continue  # not on this GPU, or not for this size
        times = take_turns(works, 5, 1)
    return min(times, key=lambda name: statistics.median(times[name]), default="any")


def _fits(dense: nn.Module, forms: Sequence[str], plan: Plan) -> bool:
    """Whether the weights of all ``forms`` lie beside the dense ones and leave room to run."""
    if not torch.cuda.is_available():
        return True
    per_weight = {
        "bf16_dense": 0.0,
        "bf16_weight": 9 / 8,
        "fp8_weight": 5 / 8,
        "torch_fp8": 1.0,
        "fp8_dense": 1.0,
    }
    linears = dense_linears(dense)
    shared = 1.0 if {"torch_fp8", "fp8_dense"} <= set(forms) else 0.0
    need = weight_bytes(dense) - shared * sum(linear.weight.numel() for linear in linears)
    for form in forms:
        for linear in linears:
            of_plan = NAMES.get(
                plan.get(linear.group.linears[0], DENSE), "bf16_weight"
            )  # activations: about as much
            need += linear.weight.numel() * per_weight[of_plan if form == "plan" else form]
    return bool(need < ROOM * torch.cuda.get_device_properties(0).total_memory)


def _pairs(forms: Sequence[str]) -> list[list[str]]:
    """The two that share weights together, every other one alone."""
    shared = [form for form in forms if form in ("torch_fp8", "fp8_dense")]
    return [*([shared] if shared else []), *([form] for form in forms if form not in shared)]


def _peak(work: Callable[[], object]) -> int:
    """Bytes that ``work`` takes besides what is there; not known without a GPU."""
    if not torch.cuda.is_available():
        return 0
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


def main() -> None:
    parser = argparse.ArgumentParser(description="One denoising step of whole models, on this GPU.")
    parser.add_argument("folder", type=Path, help="where the results go, beside those that are there")
    parser.add_argument(
        "--model", action="append", choices=[model.name for model in MODELS], help="default: all"
    )
    parser.add_argument("--form", action="append", choices=FORMS_AND_PLAN, help="default: all")
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
    settings = Settings(
        rounds=arguments.rounds, attention=arguments.attention, inductor=inductor,
        fp8={"fused_rounding": False} if arguments.own_pass else None,
    )  # fmt: skip
    for model in (model for model in MODELS if model.name in names):
        result = bench_model(
            step_model(model), forms=arguments.form or FORMS_AND_PLAN, settings=settings,
            log=lambda text: print(text, flush=True),
        )  # fmt: skip
        for form in result.forms:
            print(line(result, form), flush=True)
        print("wrote", *save(result, arguments.folder), flush=True)
        _collect()


if __name__ == "__main__":
    main()
