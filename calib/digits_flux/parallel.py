# SPDX-License-Identifier: Apache-2.0
"""The compiled digits-flux on several GPUs by diffusers' context parallelism: the same images as on one.

``torchrun --nproc-per-node 2 -m calib.digits_flux.parallel OUT.engine FOLDER`` from the repository's root, for an
engine that was compiled from the demo's model. Writes ``parallel.json`` and ``parallel.png`` into FOLDER: rows of the
images of the dense module on one GPU and on all, and of the applied one. Exit code 1: a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import lynx_compile
from calib.digits_flux import classifier, digits, sampler
from calib.digits_flux.gpu import on_device
from lynx_compile.engine.manifest import Manifest
from lynx_compile.files.outputs import Outputs
from lynx_compile.torch_ops.apply import DTYPES

IMAGES, STEPS, SEED, BATCH = 40, 20, 1, 10
LEAST_PSNR = 35.0  # dB, of what all draw against what one draws; 16 bits in another order


@dataclass(frozen=True)
class Found:
    """``psnr``: dB of the images that all GPUs draw together against those of one, by module.

    ``accuracy``: share of images that are read as their label, by module and number of GPUs.
    """

    device: str
    gpus: int
    dtype: str
    psnr: dict[str, float]
    accuracy: dict[str, float]

    def missed(self) -> list[str]:
        """The limits that are not kept, one sentence each."""
        return [
            f"{name}: {self.gpus} GPUs draw other images than one, {psnr:.1f} dB"
            for name, psnr in self.psnr.items()
            if not psnr >= LEAST_PSNR
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw in all processes, and in the first one compare, print and write."""
    parser = argparse.ArgumentParser(prog="calib.digits_flux.parallel", description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"in whole batches of {BATCH}")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    found, images = measure(given.engine, given.images, given.steps)
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    if not is_first:
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "parallel.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    sampler.contact_sheet(images, min(20, given.images), given.folder / "parallel.png")
    print(f"{given.engine.name} on {found.gpus} x {found.device}, {found.dtype}: {found.psnr} dB")
    print(f"accuracy of {given.images} images: {found.accuracy}")
    for sentence in found.missed():
        print(f"missed: {sentence}")
    return int(bool(found.missed()))


def measure(engine: Path, count: int, steps: int) -> tuple[Found, torch.Tensor]:
    """What one process and all draw, dense and applied: figures and images."""
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    dtype = DTYPES[Manifest.read(Outputs.find(engine).manifest).dtype]
    labels = torch.arange(digits.CLASSES).repeat(-(-count // digits.CLASSES))[:count]
    psnr, images = {}, {}
    for name in ("dense", "applied"):
        module = sampler.load_model(dtype).to(device)
        if name == "applied":
            lynx_compile.apply(module, engine)
        alone = sampler.sample(on_device(module), labels, SEED, steps, batch=BATCH)
        # Three heads are not the same number on two GPUs, which diffusers takes in this mode alone.
        shared = ContextParallelConfig(ulysses_degree=dist.get_world_size(), ulysses_anything=True)
        module.enable_parallelism(config=shared)
        together = sampler.sample(on_device(module), labels, SEED, steps, batch=BATCH)
        images |= {f"{name}, one": alone, f"{name}, all": together}
        error = (together - alone).square().mean().item()
        psnr[name] = round(-10 * torch.tensor(max(error, 1e-12)).log10().item(), 2)
    found = Found(
        torch.cuda.get_device_name() if device.type == "cuda" else "the CPU",
        dist.get_world_size(),
        str(dtype).removeprefix("torch."),
        psnr,
        {name: (classifier.predict(each) == labels).float().mean().item() for name, each in images.items()},
    )
    return found, torch.cat(list(images.values()))


if __name__ == "__main__":
    sys.exit(main())
