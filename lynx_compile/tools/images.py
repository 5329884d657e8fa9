# SPDX-License-Identifier: Apache-2.0
"""How alike two images of the same noise are: PSNR, SSIM, and LPIPS where its package is installed; and sheets of them.

All take images [colours, height, width] float32 in [0, 1], the dense model's first.
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

BEST_PSNR = 200.0  # of two equal images, whose PSNR is infinite
WINDOW, SIGMA = 11, 1.5
STABLE = (0.01**2, 0.03**2)


def psnr(dense: np.ndarray, other: np.ndarray) -> float:
    """dB over the dense image's largest value, at most ``BEST_PSNR``."""
    error = float(np.square(dense.astype(np.float64) - other).mean())
    if not error:
        return BEST_PSNR
    peak = max(float(dense.max()), 1e-6) ** 2
    return min(10 * math.log10(peak / error), BEST_PSNR)


def ssim(dense: np.ndarray, other: np.ndarray) -> float | None:
    """Mean structural similarity over windows of 11 x 11 pixels, Gaussian of 1.5 (Wang et al., 2004), and colours.

    Of the windows that lie wholly inside; None for an image that is smaller than one.
    """
    if min(dense.shape[-2:]) < WINDOW:
        return None
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    row = torch.exp(-at.square() / (2 * SIGMA**2))
    kernel = (torch.outer(row, row) / row.sum() ** 2)[None, None]
    x, y = (torch.from_numpy(image).double()[:, None] for image in (dense, other))

    def blurred(values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(values, kernel)

    mean_x, mean_y = blurred(x), blurred(y)
    of_x, of_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    c1, c2 = STABLE
    ratio = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (of_x + of_y + c2))
    return float(ratio.mean())


def has_lpips() -> bool:
    return importlib.util.find_spec("lpips") is not None


def lpips(dense: np.ndarray, other: np.ndarray) -> float | None:
    """Polygraphy's figure; None where the package cannot use these images."""
    from polygraphy.comparator import Comparator, IterationResult, PerceptualMetricsCompareFunc, RunResults

    results = RunResults(
        [
            (name, [IterationResult({"image": image}, runner_name=name)])
            for name, image in (("dense", dense), ("other", other))
        ]
    )
    compared = Comparator.compare_accuracy(results, compare_func=PerceptualMetricsCompareFunc())
    ((found,),) = compared[0].values()
    value: float | None = found["image"].lpips
    return value


def side_by_side(images: np.ndarray) -> np.ndarray:
    """Images [n, colours, height, width] as one [colours, height + 2, n (width + 2)], with a line around each."""
    tiles = [np.pad(image, ((0, 0), (1, 1), (1, 1)), constant_values=0.5) for image in images]
    return np.concatenate(tiles, axis=2)


def as_picture(grid: np.ndarray, side: int, smallest: int, largest: int) -> Image.Image:
    """What ``side_by_side`` made, with images of ``side`` pixels brought between ``smallest`` and ``largest``.

    Small ones become a whole number of times as large, without blur.
    """
    grid = grid[0] if len(grid) == 1 else grid[:3].transpose(1, 2, 0)
    picture = Image.fromarray((grid * 255).round().astype(np.uint8))
    if side > largest:
        shrunk = (picture.width * largest // side, picture.height * largest // side)
        return picture.resize(shrunk, Image.Resampling.LANCZOS)
    factor = max(smallest // side, 1)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
