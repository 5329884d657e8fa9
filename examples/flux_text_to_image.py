# SPDX-License-Identifier: Apache-2.0
"""A picture by FLUX.1-dev with compiled linears.

    lynx-compile engines/flux.yaml -o flux.engine --set engine.backend=torch
    python examples/flux_text_to_image.py --engine flux.engine --prompt "a lynx in the snow" -o lynx.png

With ``--tensorrt`` the engine of a recipe for TensorRT draws, at the size that it was compiled for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

import lynx_compile


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a picture with FLUX.1-dev and compiled linears.")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id or folder")
    parser.add_argument("--engine", type=Path, required=True, help="what lynx-compile wrote")
    parser.add_argument("--tensorrt", action="store_true", help="run the engine, and no transformer in torch")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", "-o", type=Path, required=True)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tensorrt:
        pipe = FluxPipeline.from_pretrained(options.model, transformer=None, dtype=torch.bfloat16)
        pipe.transformer = lynx_compile.load(options.engine)
    else:
        pipe = FluxPipeline.from_pretrained(options.model, dtype=torch.bfloat16)
        lynx_compile.apply(pipe.transformer, options.engine)
    pipe.to(device)
    if device == "cuda" and not options.tensorrt:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    image = pipe(
        options.prompt,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        guidance_scale=3.5,
        max_sequence_length=512,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    image.save(options.output)


if __name__ == "__main__":
    main()
