# SPDX-License-Identifier: Apache-2.0
"""An edited picture by Qwen-Image-Edit with compiled linears.

lynx-compile examples/qwen_image_edit.yaml -o edit.engine
python examples/qwen_image_edit.py --engine edit.engine --image cat.png --prompt "give it a hat" -o hat.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

import lynx_compile


def main() -> None:
    parser = argparse.ArgumentParser(description="Edit a picture with Qwen-Image-Edit and compiled linears.")
    parser.add_argument("--model", default="Qwen/Qwen-Image-Edit", help="hub id or folder")
    parser.add_argument("--engine", type=Path, required=True, help="what lynx-compile wrote")
    parser.add_argument("--image", type=Path, required=True, help="the picture to edit")
    parser.add_argument("--prompt", required=True, help="what to do with it")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", "-o", type=Path, required=True)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = QwenImageEditPipeline.from_pretrained(options.model, dtype=torch.bfloat16)
    lynx_compile.apply(pipe.transformer, options.engine)
    pipe.to(device)
    if device == "cuda":
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    image = pipe(
        image=Image.open(options.image).convert("RGB"),
        prompt=options.prompt,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    image.save(options.output)


if __name__ == "__main__":
    main()
