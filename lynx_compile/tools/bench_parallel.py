# SPDX-License-Identifier: Apache-2.0
"""A denoising step of FLUX.1-dev on several GPUs, by diffusers' own context parallelism, dense and compressed.

``torchrun --nproc-per-node 2 -m lynx_compile.tools.bench_parallel engines/bench``: every GPU holds the whole
transformer (full size, random weights) and its share of the tokens; attention exchanges heads for tokens (Ulysses).
Each form is compiled region by region and runs on one GPU, on each by itself at once, and then on all together, in
turns with the other forms; launched by Python, and, where NCCL lets them be captured, as a CUDA graph.

What all GPUs draw together is held against what one draws: a few steps of a sampler from one noise.
Sums in another order differ in their last bits, and how much that comes to at the end is measured on one GPU, which
draws the same picture with its tokens shuffled.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import sdpa_kernel

from lynx_compile.errors import InputError, StageError, first_line
from lynx_compile.files.atomic import save_text
from lynx_compile.tools.bench_model import ATTENTION
from lynx_compile.tools.full_size import find, step_model
from lynx_compile.tools.model_forms import FORMS, Forms, merge_dense, observe
from lynx_compile.tools.step_model import StepModel
from lynx_compile.tools.timing import file_name, take_turns

MODEL = "flux1_dev"
STEPS = 4  # of the sampler
MOST_OVER_SHUFFLED = 3.0  # times what shuffled tokens change, that several GPUs may change
LEAST_DIFFERENCE = 2.0**-8  # which is allowed in any case: a last bit of bf16

Log = Callable[[str], None]


@dataclass(frozen=True)
class FormOnGpus:
    """One form. ``difference``: of what all GPUs draw together from what one draws; ``shuffled``: see above.

    ``ms``: of a step on one GPU and on all, launched by Python; ``graph_ms``: the same as a CUDA graph, which may be
    missing. Medians.
    """

    difference: float
    shuffled: float
    ms: tuple[float, ...] = ()
    graph_ms: tuple[float, ...] = ()

    @property
    def is_right(self) -> bool:
        return self.difference <= max(MOST_OVER_SHUFFLED * self.shuffled, LEAST_DIFFERENCE)


@dataclass(frozen=True)
class ParallelResult:
    """``no_graph``: why there are no times of CUDA graphs, where there are none."""

    model: str
    gpus: int
    attention: str
    forms: dict[str, FormOnGpus]
    device: str
    torch: str
    diffusers: str
    date: str
    no_graph: str | None = None


def bench_parallel(
    model: StepModel,
    *,
    forms: Sequence[str] = FORMS,
    rounds: int = 10,
    attention: str = "cudnn",
    device: str = "cuda",
    log: Log = lambda line: None,
    save: Callable[[ParallelResult], None] = lambda result: None,
) -> ParallelResult:
    """Measure ``forms`` of a FLUX in all processes of torch's default group, a GPU each; the dense one always.

    Args:
        device: on "cpu" nothing is compiled or timed.
        save: gets what is known, whenever that is more: a CUDA graph that hangs must not take the rest with it.

    Raises:
        StageError: the GPUs draw another picture together than one does.
    """
    import diffusers
    from diffusers import ContextParallelConfig

    torch._dynamo.config.recompile_limit = 64  # the forms are variants of the same blocks' code
    dense = model.build(device)
    call = {**model.step(device), "return_dict": False}
    merge_dense(dense, observe(dense, call))
    maker = Forms(dense)
    modules = {form: maker.make(form) for form in FORMS if form in {*forms, "bf16_dense"}}
    maker.release()
    log(f"{model.name}: {', '.join(modules)}")
    on_gpu = device == "cuda"
    with torch.no_grad(), sdpa_kernel(ATTENTION[attention]) if on_gpu else contextlib.nullcontext():
        if on_gpu:
            _compile(modules)
        alone = {form: _draw(module, call) for form, module in modules.items()}
        shuffled = {form: _draw_shuffled(module, call) for form, module in modules.items()}
        log("drawn by one GPU")
        works = {form: _step(module, call) for form, module in modules.items()}
        once = _medians(works, rounds) if on_gpu else {}
        graphs, no_graph = _of_graphs(works, rounds) if on_gpu else ({}, None)
        log(f"one GPU, ms a step: {once}; as a CUDA graph: {graphs or no_graph}")
        torch._dynamo.reset()
        for module in modules.values():
            module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))  # type: ignore[operator]
        if on_gpu:
            _compile(modules)
        together = {form: _draw(module, call) for form, module in modules.items()}
        log("drawn by all GPUs")
        found = {
            form: FormOnGpus(_distance(together[form], alone[form]), _distance(shuffled[form], alone[form]))
            for form in modules
        }
        result = ParallelResult(
            model.name, dist.get_world_size(), attention, found,
            torch.cuda.get_device_name() if on_gpu else "cpu", torch.__version__, diffusers.__version__,
            datetime.date.today().isoformat(),
        )  # fmt: skip
        if on_gpu:
            result = _timed(result, "ms", once, _medians(works, rounds))
            save(result)
            log("all GPUs are timed; CUDA graphs follow")
            if graphs:
                together_ms, no_graph = _of_graphs(works, rounds)
                result = _timed(result, "graph_ms", graphs, together_ms) if together_ms else result
            result = replace(result, no_graph=no_graph)
            save(result)
    _require_right(result)
    return result


def _compile(modules: Mapping[str, nn.Module]) -> None:
    for module in modules.values():
        module.compile_repeated_blocks(fullgraph=True, dynamic=False)  # type: ignore[operator]


def _step(module: nn.Module, call: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: module(**call)


def _draw(module: nn.Module, call: Mapping[str, Any]) -> torch.Tensor:
    """What Euler's steps from the noise in ``call`` come to, [1, tokens, channels], the same on every GPU."""
    latents = call["hidden_states"]
    times = torch.linspace(1, 0, STEPS + 1).tolist()
    for now, then in pairwise(times):
        timestep = torch.full_like(call["timestep"], now)
        velocity = module(**{**call, "hidden_states": latents, "timestep": timestep})[0]
        latents = latents + (then - now) * velocity
    return latents.float()


def _draw_shuffled(module: nn.Module, call: Mapping[str, Any]) -> torch.Tensor:
    """The same with the image's tokens in another order, back in their own at the end."""
    order = torch.randperm(len(call["img_ids"]), generator=torch.Generator().manual_seed(0))
    order = order.to(call["img_ids"].device)
    shuffled = {**call, "hidden_states": call["hidden_states"][:, order], "img_ids": call["img_ids"][order]}
    return _draw(module, shuffled)[:, order.argsort()]


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|a - b| / |b|, the largest that a process sees."""
    distance = ((found - wanted).norm() / wanted.norm()).double().cpu()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, float(distance))
    return max(every)


def _require_right(result: ParallelResult) -> None:
    wrong = [
        f"{form}: {each.difference:.4f}, where shuffled tokens make {each.shuffled:.4f}"
        for form, each in result.forms.items()
        if not each.is_right
    ]
    if wrong:
        raise StageError(
            "bench", f"{result.gpus} GPUs draw another picture than one ({'; '.join(wrong)}).", "Report this."
        )


def _medians(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each work, in turns, which all processes take in one order."""
    dist.barrier()
    return {name: statistics.median(times) / 1000 for name, times in take_turns(works, rounds, 1).items()}


def _captured(works: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """As CUDA graphs. Other threads go on meanwhile: NCCL's looks after what it has been given."""
    found: dict[str, Callable[[], object]] = {}
    for name, work in works.items():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        found[name] = graph.replay
    return found


def _of_graphs(works: Mapping[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], str | None]:
    """``_medians`` of the works as CUDA graphs; none, and why, where they cannot be captured."""
    try:
        return _medians(_captured(works), rounds), None
    except RuntimeError as error:
        return {}, first_line(error)


def _timed(
    result: ParallelResult, name: str, once: Mapping[str, float], together: Mapping[str, float]
) -> ParallelResult:
    forms = {}
    for form, each in result.forms.items():
        times: dict[str, Any] = {name: (once[form], together[form])}
        forms[form] = replace(each, **times)
    return replace(result, forms=forms)


def save(result: ParallelResult, folder: Path) -> Path:
    """Write ``DEVICE-xN-parallel.json``."""
    path = folder / f"{file_name(result.device)}-x{result.gpus}-parallel.json"
    save_text(path, json.dumps(asdict(result), indent=1) + "\n")
    return path


def lines(result: ParallelResult) -> list[str]:
    """For people."""
    found = [f"{result.model}, {result.gpus} x {result.device}, attention by {result.attention}"]
    for form, each in result.forms.items():
        text = f"{form:<12} differs by {each.difference:.5f} (shuffled tokens {each.shuffled:.5f})"
        for how, times, dense in (
            ("launched", each.ms, result.forms["bf16_dense"].ms),
            ("graph", each.graph_ms, result.forms["bf16_dense"].graph_ms),
        ):
            if times:
                text += (
                    f"; {how} {times[0]:.1f} -> {times[1]:.1f} ms ({times[0] / times[1]:.2f}x), "
                    f"{dense[1] / times[1]:.2f}x over bf16 on all"
                )
        found.append(text)
    return found + ([f"no CUDA graphs: {result.no_graph}"] if result.no_graph else [])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A step of FLUX.1-dev on several GPUs; start it with torchrun."
    )
    parser.add_argument("folder", type=Path, help="where the result goes")
    parser.add_argument("--form", action="append", choices=FORMS, help="default: all but torch_fp8")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--attention", choices=list(ATTENTION), default="cudnn")
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        raise InputError(
            "This measures several GPUs, a process each.",
            "Run: torchrun --nproc-per-node 2 -m lynx_compile.tools.bench_parallel FOLDER.",
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    began, speaks = time.monotonic(), dist.get_rank() == 0

    def log(text: str) -> None:
        if speaks:
            print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    def keep(result: ParallelResult) -> None:
        if speaks:
            print(*lines(result), f"wrote {save(result, arguments.folder)}", sep="\n", flush=True)

    bench_parallel(
        step_model(find(MODEL)), forms=arguments.form or [form for form in FORMS if form != "torch_fp8"],
        rounds=arguments.rounds, attention=arguments.attention, log=log, save=keep,
    )  # fmt: skip
    sys.stdout.flush()
    os._exit(0)  # NCCL's communicators may be held by graphs, and do not go quietly


if __name__ == "__main__":
    main()
