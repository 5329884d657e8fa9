# SPDX-License-Identifier: Apache-2.0
"""Train a model by flow matching for so many minutes or steps, on a GPU where there is one: the reference models' loop.

Needs torch and diffusers alone, so that a GPU machine without the rest of this project can run it.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import nn

SYNC_EVERY = 20  # steps between two looks at the clock, for which the CPU waits for the GPU
COLD = 5  # steps before the clock starts: compilation and the first choices of kernels


@dataclass(frozen=True)
class Settings:
    """What decides how weights are learned; ``minutes`` of training, or ``steps`` where it is not None."""

    minutes: float
    steps: int | None = None
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    gradient_norm: float = 1.0
    ema_decay: float = 0.9995
    seed: int = 0


Loss = Callable[[nn.Module, torch.Generator], torch.Tensor]


def train(model: nn.Module, loss: Loss, settings: Settings, log: Path) -> nn.Module:
    """Train ``model`` where its parameters are; half a cosine of the time, or of the steps, takes the rate to zero.

    Args:
        loss: of a random batch, drawn with the generator, which is on the parameters' device.
        log: a CSV of step, mean loss since the last line, learning rate and seconds.

    Returns:
        The moving average of the weights, in evaluation mode. A run by minutes ends in slightly different weights on
        every machine, one by steps in the same on the same machine but for what its kernels sum in another order.
    """
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(settings.seed)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    averaged, current = list(ema.parameters()), list(model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings.learning_rate,
        settings.betas,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    step, seen, progress, begin = 0, 0, 0.0, time.monotonic()
    losses = torch.zeros((), device=device)
    log.write_text("step,loss,learning_rate,seconds\n")
    while progress < 1:
        rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with half:
            found = loss(model, random)
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(current, settings.gradient_norm)
        optimizer.step()
        # A young average must not remember the untrained weights.
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - min(settings.ema_decay, (1 + step) / (10 + step)))
        losses += found.detach()
        step += 1
        if step == COLD:
            losses.item()
            begin = time.monotonic()
        if settings.steps is not None:
            progress = step / settings.steps
        if step % SYNC_EVERY == 0 or progress >= 1:
            mean = losses.item() / (step - seen)
            seen = step
            losses.zero_()
            seconds = time.monotonic() - begin
            if settings.steps is None:
                progress = seconds / (60 * settings.minutes)
            if step % (5 * SYNC_EVERY) == 0 or progress >= 1:
                line = f"{step},{mean:.5f},{rate:.2e},{seconds:.0f}"
                with log.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)
    return ema


def velocity_loss(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    random: torch.Generator,
    logit_normal: bool = True,
) -> torch.Tensor:
    """Mean squared velocity error at x_t = (1 - t) x_0 + t noise (rectified flow): velocity = noise - x_0.

    Args:
        velocity: of x_t [batch, tokens, channels] and t [batch] in [0, 1].
        clean: x_0, float32.
        logit_normal: t = sigmoid of a standard normal (Esser et al. 2024); else uniform.
    """
    noise = torch.randn(clean.shape, generator=random, device=clean.device)
    draw = torch.randn if logit_normal else torch.rand
    t = draw(len(clean), generator=random, device=clean.device)
    t = t.sigmoid() if logit_normal else t
    found = velocity(torch.lerp(clean, noise, t[:, None, None]), t)
    return nn.functional.mse_loss(found.float(), noise - clean)


def start_at_zero(model: nn.Module, names: Callable[[str], bool]) -> None:
    """Zero the linears whose path ``names`` accepts: modulations and the output layer, as in DiT."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and names(path):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def save_pipeline(transformer: ModelMixin, pipeline: str, absent: Sequence[str], folder: Path) -> None:
    """Write transformer (fp16), scheduler and index in diffusers' layout; the components ``absent`` are null."""
    copy.deepcopy(transformer).half().save_pretrained(folder / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", type(transformer).__name__],
        **{component: [None, None] for component in absent},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
