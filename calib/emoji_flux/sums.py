# SPDX-License-Identifier: Apache-2.0
"""What the sums of FP8 tensor cores lose on the longest linears of an emoji model, by an emulation and by the kernels.

``python -m calib.emoji_flux.sums [--model build/emoji-945m] [--whole | --widths]``. An instruction of Hopper adds a
step's products, 32 of a dense operand and those of 64 channels of a 2:4 one, to the sum that there is, all of them cut
after so many bits behind the largest one's first (13: DeepSeek-V3, arXiv 2412.19437, section 3.3.2, says 14 with it). A
kernel that leaves the sum there for all of K ("fast accumulation") loses some of it in every step; one that promotes it
to float32 every so many channels, and begins anew, loses little. Errors are relative to the exact products of the same
FP8 values, so that rounding to FP8 is no part of them. ``--widths``: of normal numbers at many K instead, no model.
``--whole``: the error of the model's output against the dense model's instead, all linears of its blocks in dense FP8,
with exact sums and cut ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from calib.emoji_flux import sampler
from calib.emoji_flux.train import PICTURES
from lynx_compile.ops.fp8 import Rounded, round_rows
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.tools.compare_torch import squares_of
from lynx_compile.torch_ops.fp8_bindings import Fp8Linear, load_fp8_library, tile_count
from lynx_compile.torch_ops.operators import fp8_kernels_run

BITS = 13
PRODUCTS = 32  # added by an instruction
PROMOTED = 512  # channels
TOKENS, ROWS = 64, 64  # that are looked at
AT_STEP = 10  # of the pipeline's 20
WIDTHS = (1280, 3072, 4096, 5120, 6144, 8192, 10240, 12288, 15360, 24576)  # of --widths
TIMES = (1.0, 0.5)  # of the calls of the whole model
TINY = 1e-30
HALF = torch.bfloat16  # of results by kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=sampler.MODEL, help="folder of calib.emoji_flux.train")
    parser.add_argument("--bits", type=int, default=BITS)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--whole", action="store_true", help="the model's output")
    instead.add_argument("--widths", action="store_true", help="normal numbers at many K")
    given = parser.parse_args()
    print(f"sums cut after {given.bits} bits", flush=True)
    if given.whole:
        for time, exact, cut in whole_models(given.model, given.bits):
            print(f"t {time:g}: output error in dense FP8 {exact:.4f}, with cut sums {cut:.4f}", flush=True)
        return
    if given.widths:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        for width in WIDTHS:
            x, weight = torch.randn(TOKENS, width, device=device), torch.randn(ROWS, width, device=device)
            print_line("normal numbers", x, weight, given.bits)
        return
    for path, x, weight in longest_linears(given.model):
        print_line(path, x, weight, given.bits)
        torch.manual_seed(0)
        print_line("  normal numbers instead", torch.randn_like(x), torch.randn_like(weight), given.bits)


def print_line(name: str, x: torch.Tensor, weight: torch.Tensor, bits: int) -> None:
    parts = [f"{name:36s} K {x.shape[1]:6d}"]
    for form, keep in (("dense", None), ("2:4", keep_mask(weight))):
        read, rounded = round_rows(x), round_rows(weight, keep)
        exact = _exact(read, rounded)
        step = PRODUCTS if keep is None else 2 * PRODUCTS
        values, of_weight = read.values.float(), rounded.values.float()
        found = added(values, of_weight, bits, step)
        segments = zip(values.split(PROMOTED, 1), of_weight.split(PROMOTED, 1), strict=True)
        promoted = torch.stack([added(a, b, bits, step) for a, b in segments]).sum(0)
        fast, slow = (relative_error(_scaled(each, read, rounded), exact) for each in (found, promoted))
        parts.append(f"{form} {fast:.4f} promoted {slow:.4f}")
        if errors := list(_by_kernels(x, rounded, keep)):
            parts.append("kernels " + " ".join(f"{error:.4f}" for error in errors))
        if x.is_cuda and keep is None:
            fast, slow = (_by_torch(read, rounded, exact, fast) for fast in (True, False))
            parts.append(f"torch fast {fast:.4f} slow {slow:.4f}")
    print("  ".join(parts), flush=True)


def longest_linears(folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(path, x [tokens, K], weight [N, K]) of every linear whose K is more than the hidden size, float32."""
    model, prompts = sampler.opened(folder, PICTURES[:4])
    hidden = model.config.num_attention_heads * model.config.attention_head_dim
    long = {
        path: linear
        for path, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and linear.in_features > hidden and "blocks" in path
    }
    read: dict[str, list[torch.Tensor]] = {path: [] for path in long}
    for path, linear in long.items():
        linear.register_forward_pre_hook(lambda _, given, path=path: read[path].append(given[0].detach()))
    sampler.sample(sampler.dense(model), prompts, seed=0, guidance=1)
    choice = torch.Generator().manual_seed(0)
    for path, linear in long.items():
        x = read[path][AT_STEP].flatten(0, -2)
        rows = torch.randperm(len(x), generator=choice)[:TOKENS].to(x.device)
        yield path, x[rows], linear.weight.detach()[:ROWS]


@torch.no_grad()
def whole_models(folder: Path, bits: int) -> Iterator[tuple[float, float, float]]:
    """(t, error with exact sums, with cut ones) of the model's output against the dense model's, of one image."""
    model, inputs = sampler.opened(folder, PICTURES[:1])
    linears: list[Any] = [
        linear
        for path, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and "blocks" in path and "norm" not in path
    ]
    inputs |= {"hidden_states": sampler.noise(seed=0, count=1), **sampler.position_ids()}
    for time in TIMES:
        at = {**inputs, "timestep": torch.tensor([time])}
        at = {name: tensor.to(model.device) for name, tensor in at.items()}
        dense = model(**at, return_dict=False)[0]
        errors = []
        for product in (torch.nn.functional.linear, lambda x, w: added(x, w, bits, PRODUCTS)):
            for linear in linears:
                linear.forward = _in_fp8(linear, product)
            errors.append(relative_error(model(**at, return_dict=False)[0], dense))
        for linear in linears:
            del linear.forward
        exact, cut = errors
        yield time, exact, cut


def _in_fp8(
    linear: torch.nn.Linear, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = round_rows(linear.weight.detach())

    def forward(x: torch.Tensor) -> torch.Tensor:
        read = round_rows(x.reshape(-1, x.shape[-1]))
        values, of_weight = read.values.float(), weight.values.float()
        parts = [product(some, of_weight) for some in values.split(TOKENS)]
        y = torch.cat(parts) * read.scale[:, None] * weight.scale + linear.bias
        return y.reshape(*x.shape[:-1], -1)

    return forward


def added(x: torch.Tensor, weight: torch.Tensor, bits: int, step: int) -> torch.Tensor:
    """x W^T as a tensor core adds it: x [tokens, K], W [N, K] float32, ``step`` channels at once."""
    total = x.new_zeros(len(x), len(weight))
    for some, of_weight in zip(x.split(step, 1), weight.split(step, 1), strict=True):
        products = some[:, None] * of_weight[None]
        largest = products.abs().amax(-1).maximum(total.abs()).clamp_min(TINY)
        unit = torch.exp2(largest.log2().floor() - bits)
        total = ((total / unit).trunc() + (products / unit[..., None]).trunc().sum(-1)) * unit
    return total


def _by_kernels(x: torch.Tensor, weight: Rounded, keep: torch.Tensor | None) -> Iterator[float]:
    """Errors of every tile that the library has, where it runs here."""
    if not (x.is_cuda and fp8_kernels_run(HALF)):
        return
    library = load_fp8_library()
    x = x.to(HALF).contiguous()
    operand = "dense" if keep is None else "sparse weight"
    bias = torch.zeros(len(weight.values), dtype=HALF, device=x.device)
    linear = Fp8Linear(library, weight, bias, rows=len(x), operand=operand, keep=keep)
    exact = _exact(round_rows(x), weight)
    for tile in range(tile_count(library, HALF, operand)):
        yield _beyond_rounding(linear(x, tile), exact)


def _by_torch(x: Rounded, weight: Rounded, exact: torch.Tensor, fast: bool) -> float:
    """Error of torch's own product, with and without fast accumulation."""
    y = torch._scaled_mm(
        x.values, weight.values.T, scale_a=x.scale[:, None], scale_b=weight.scale[None], out_dtype=HALF,
        use_fast_accum=fast,
    )  # fmt: skip
    return _beyond_rounding(y, exact)


def _beyond_rounding(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Error of a result in 16 bits without what its own rounding adds."""
    rounding = relative_error(exact.to(y.dtype), exact)
    return max(relative_error(y, exact) ** 2 - rounding**2, 0) ** 0.5


def _exact(x: Rounded, weight: Rounded) -> torch.Tensor:
    return x.dequantized(torch.float64) @ weight.dequantized(torch.float64).T


def _scaled(found: torch.Tensor, x: Rounded, weight: Rounded) -> torch.Tensor:
    return found.double() * x.scale.double()[:, None] * weight.scale.double()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return squares_of(found, exact).error


def shortfall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """By how much ``found`` is too small on average, relative to ``exact``."""
    found, exact = found.double(), exact.double()
    return 1 - float((found * exact).sum() / exact.square().sum())


if __name__ == "__main__":
    main()
