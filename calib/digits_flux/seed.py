# SPDX-License-Identifier: Apache-2.0
"""Write what a program without Python needs to draw digits: noise, conditioning and the schedule, as safetensors.

``python -m calib.digits_flux.seed seed.safetensors [--seed 0] [--steps 20]`` from the repository's root;
``examples/cpp`` reads it. The same arguments give the same bytes, and the same noise as ``sampler.sample``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from calib.digits_flux import digits, sampler
from lynx_compile.files.tensors import save_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seed < 0:
        parser.error("--steps must be at least 1, --seed at least 0")
    save_tensors(arguments.output, seed_tensors(arguments.seed, arguments.steps))


def seed_tensors(seed: int, steps: int) -> dict[str, torch.Tensor]:
    """All float32, one image per digit.

    Returns:
        ``latents`` [10, 64, 4], noise; ``sigmas`` [steps + 1], from 1 down to 0; ``timesteps`` [steps], as the
        transformer takes them; and the transformer's other inputs under their names.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(sampler.MODEL / "scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / steps, steps).tolist())
    prompts = digits.load_conditioning()
    return {
        "latents": sampler.noise(seed, digits.CLASSES),
        "sigmas": scheduler.sigmas.float(),
        "timesteps": (scheduler.timesteps / scheduler.config.num_train_timesteps).float(),
        **prompts,
        **sampler.position_ids(prompts),
    }


if __name__ == "__main__":
    main()
