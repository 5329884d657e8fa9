# SPDX-License-Identifier: Apache-2.0
"""``compare.metric`` of engines/digits-flux.yaml: what the classifier makes of the images of both models."""

from __future__ import annotations

import numpy as np
import torch

from calib.digits_flux import classifier, evaluate


def digits_read(dense: np.ndarray, lynx: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """Share of the images read as the digit that they were drawn for, and of the pairs read alike; and how far the
    images' features are from the dense model's (``evaluate.frechet_distance``; of few images it says little).

    Args:
        dense, lynx: [n, 1, 16, 16] in [0, 1]. prompts: the digit of each; the calibration source has a row per digit.
    """
    labels = torch.from_numpy(prompts)
    both = [torch.from_numpy(images)[:, 0] for images in (dense, lynx)]
    read = [classifier.predict(images) for images in both]
    features = [classifier.features(images) for images in both]
    return {
        "dense_accuracy": (read[0] == labels).double().mean().item(),
        "accuracy": (read[1] == labels).double().mean().item(),
        "agreement": (read[0] == read[1]).double().mean().item(),
        "frechet": max(evaluate.frechet_distance(features[1], features[0]), 0.0),
    }
