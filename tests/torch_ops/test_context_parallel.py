# SPDX-License-Identifier: Apache-2.0
"""Compiled linears under diffusers' context parallelism: two processes, gloo, a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from safetensors.torch import load_file

import lynx_compile
from lynx_compile.errors import StageError
from lynx_compile.models.pipeline_loader import load_pipeline
from lynx_compile.tools import bench_parallel, full_size
from lynx_compile.tools.bench_parallel import FormOnGpus, ParallelResult
from lynx_compile.tools.bench_parallel import bench_parallel as bench
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.modules import Fp8Linear
from tests.processes import run_together
from tests.tools.test_bench_model import TINY


def _together(folder: Path, work: Callable[[], None]) -> None:
    def process(rank: int) -> None:
        dist.init_process_group("gloo")
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
        work()
        dist.destroy_process_group()

    for each in run_together(folder, process):
        assert each.code == 0, each.said


@pytest.mark.slow
def test_an_applied_pipeline_draws_the_same_on_two_processes(
    tiny: Path, compiled_tiny: Path, tmp_path: Path
) -> None:
    """Four steps of FLUX's own loop; and 5 text tokens, which are 3 and 2 of them, where diffusers allows that."""

    def work() -> None:
        def module() -> FluxTransformer2DModel:
            folder = tiny / "model" / "transformer"
            return FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float16)

        dense = _drawn(tiny, module())
        alone = _drawn(tiny, lynx_compile.apply(module(), compiled_tiny))
        lost = _distance(alone, dense)
        before, after = module(), lynx_compile.apply(module(), compiled_tiny)
        before.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        lynx_compile.apply(before, compiled_tiny)
        after.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        for parallel in (before, after):
            seen: list[int] = []
            parallel.transformer_blocks[0].register_forward_pre_hook(
                lambda block, args, kwargs, seen=seen: seen.append(kwargs["hidden_states"].shape[1]),
                with_kwargs=True,
            )
            assert _distance(_drawn(tiny, parallel), alone) < lost / 10 and set(seen) == {32}  # of 64 tokens
        assert _distance(_drawn(tiny, lynx_compile.restore(after)), dense) < lost / 10
        uneven = lynx_compile.apply(module(), compiled_tiny)
        wanted = _drawn(tiny, uneven, text=5)
        uneven.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
        assert _distance(_drawn(tiny, uneven, text=5), wanted) < lost / 10

    _together(tmp_path, work)


def _drawn(tiny: Path, transformer: FluxTransformer2DModel, text: int = 4) -> torch.Tensor:
    modules = {"transformer": transformer}
    pipe = load_pipeline(tiny / "model", dtype=torch.float16, encoded_prompts=True, modules=modules)
    pipe.set_progress_bar_config(disable=True)
    prompts = {name: tensor[:1].half() for name, tensor in load_file(tiny / "prompts.safetensors").items()}
    prompts["prompt_embeds"] = prompts["prompt_embeds"].repeat(1, 2, 1)[:, :text]
    images: torch.Tensor = pipe(
        **prompts, height=128, width=128, num_inference_steps=4, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return images.float()


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.slow
def test_the_bench_holds_several_gpus_to_one(tmp_path: Path) -> None:
    """All forms, FP8 with its scale a token too; and it finds a linear that mixes its tokens up."""

    def work() -> None:
        operators.metadata_layout = lambda dtype: 90
        bench_parallel.STEPS = 2
        config = {**TINY["flux1_dev"], "num_layers": 1, "num_single_layers": 1}
        size = full_size.Size(8, 8, 64)
        model = full_size.step_model(
            dataclasses.replace(full_size.find("flux1_dev"), config=config, size=size)
        )
        result = bench(model, forms=("bf16_weight", "fp8_weight"), device="cpu")
        assert set(result.forms) == {"bf16_dense", "bf16_weight", "fp8_weight"}
        assert all(each.shuffled < 0.1 for each in result.forms.values())
        rows = Fp8Linear.rows
        Fp8Linear.rows = lambda self, x: rows(self, x - x.mean(0))  # type: ignore[method-assign]
        with pytest.raises(StageError, match="another picture than one .fp8_weight: [^;]*[)]. Report"):
            bench(model, forms=("fp8_weight",), device="cpu")

    _together(tmp_path, work)


def test_what_is_wrong_is_refused_and_what_is_measured_said() -> None:
    right = FormOnGpus(0.01, 0.009, (140.0, 75.0), (138.0, 70.0))
    result = ParallelResult("m", 2, "cudnn", {"bf16_dense": right}, "H100", "2", "0", "2026", None)
    bench_parallel._require_right(result)
    assert "launched 140.0 -> 75.0 ms (1.87x), 1.00x over bf16 on all" in bench_parallel.lines(result)[1]
    wrong = dataclasses.replace(result, forms={"fp8_weight": FormOnGpus(0.1, 0.009)})
    with pytest.raises(StageError, match="2 GPUs draw another picture than one .fp8_weight: 0.1000"):
        bench_parallel._require_right(wrong)
