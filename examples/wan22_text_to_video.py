# SPDX-License-Identifier: Apache-2.0
"""A video by Wan 2.2, whose two transformers take turns: one for the first steps, one for the others.

    lynx-compile examples/wan22.yaml -o wan.engine
    python examples/wan22_text_to_video.py --engine wan.engine --prompt "a lynx runs through snow" -o lynx.gif

The compiler writes a set of files for each: wan.transformer.engine and wan.transformer_2.engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline

import lynx_compile


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a video with Wan 2.2 and compiled linears.")
    parser.add_argument("--model", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers", help="hub id or folder")
    parser.add_argument("--engine", type=Path, required=True, help="the name that lynx-compile was given")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", "-o", type=Path, required=True, help="a .gif or .webp")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(options.model, dtype=torch.bfloat16)
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name)
        lynx_compile.apply(module, options.engine.with_suffix(f".{name}.engine"))
        if device == "cuda":
            module.compile_repeated_blocks(fullgraph=True)
    pipe.to(device)
    frames = pipe(
        options.prompt,
        height=options.height,
        width=options.width,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        output_type="pil",
        generator=torch.Generator().manual_seed(options.seed),
    ).frames[0]
    frames[0].save(options.output, save_all=True, append_images=frames[1:], duration=1000 // 16, loop=0)


if __name__ == "__main__":
    main()
