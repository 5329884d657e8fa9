# SPDX-License-Identifier: Apache-2.0
"""How far the images of a model with other linears are from the dense model's: what a budget of ``min_psnr`` asks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lynx_compile.errors import InputError
from lynx_compile.files.progress import no_progress
from lynx_compile.models.place import reclaim
from lynx_compile.passes.block_weights import substituted
from lynx_compile.recipe import Recipe
from lynx_compile.tools.held_out import Sampler, draw, open_sampler
from lynx_compile.tools.images import psnr


class Drawn:
    """Draws as ``lynx-compile compare`` does: the recipe's pipeline, ``compare.samples`` images of ``compare.seed``.

    The pipeline is opened, and the dense model's images are drawn, when it is first called.
    """

    def __init__(self, recipe: Recipe, converted: Path, component: str) -> None:
        self._recipe, self._converted, self._component = recipe, converted, component
        self._sampler: Sampler | None = None
        self._dense: np.ndarray | None = None

    def __call__(self, linears: Mapping[str, torch.nn.Module]) -> float:
        """Mean PSNR of the images, dB, where the denoiser computes with ``linears``.

        Raises:
            InputError: the pipeline returns no images.
        """
        if self._sampler is None:
            self._sampler = open_sampler(self._recipe, self._converted)
        sampler = self._sampler
        assert sampler is not None, "the recipe has checked it"
        if self._dense is None:
            self._dense = self._images(sampler)
        module: Any = getattr(sampler.pipe, self._component)
        like = next(p for p in module.parameters() if p.is_floating_point())
        with (
            substituted(
                module, {path: linear.to(like.device, like.dtype) for path, linear in linears.items()}
            ),
            torch.no_grad(),
        ):
            images = self._images(sampler)
        return float(np.mean([psnr(a, b) for a, b in zip(self._dense, images, strict=True)]))

    def release(self) -> None:
        """Forget the pipeline, whose memory other stages need, and not the dense model's images."""
        self._sampler = None
        reclaim()

    def _images(self, sampler: Sampler) -> np.ndarray:
        images = draw(sampler, no_progress)
        if images is None:
            raise InputError(
                "budget.min_psnr compares images, and the pipeline returns none.",
                "Give budget.max_output_error instead, or an output_type under 'call' that returns images.",
            )
        return images
