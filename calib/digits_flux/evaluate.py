# SPDX-License-Identifier: Apache-2.0
"""How good the trained model is: class accuracy and Fréchet distance of its samples, and a sheet to look at.

``python -m calib.digits_flux.evaluate`` from the repository's root.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import typer

from calib.digits_flux import classifier, digits, sampler

PER_CLASS = 50
STEPS = 20
SEED = 0
SHEET = digits.HERE / "samples.png"
SHEET_COLUMNS = 10


@dataclass(frozen=True)
class Quality:
    accuracy: float  # share of the samples that the classifier gives their label
    frechet: float  # distance of their features to those of the training digits


def main() -> None:
    """Draw samples, print how good they are, and overwrite the committed sheet."""
    begin = time.monotonic()
    labels = torch.arange(digits.CLASSES).repeat(PER_CLASS)  # 0 .. 9 in turn: a column each
    images = sampler.sample(sampler.dense(sampler.load_model()), labels, SEED, STEPS)
    quality = judge(images, labels)
    sampler.contact_sheet(images[: SHEET_COLUMNS**2], SHEET_COLUMNS, SHEET)
    train, held_out = (digits.digits(split)[0] for split in ("train", "held_out"))
    floor = frechet_distance(classifier.features(held_out), classifier.features(train))
    print(f"{len(labels)} samples, {STEPS} steps, seed {SEED}: {time.monotonic() - begin:.0f} s")
    real_accuracy = classifier.held_out_accuracy()
    print(f"classifier accuracy on samples {quality.accuracy:.1%}, on held-out digits {real_accuracy:.1%}")
    print(f"Fréchet distance to the training digits {quality.frechet:.2f}; of held-out digits {floor:.2f}")


def judge(images: torch.Tensor, labels: torch.Tensor) -> Quality:
    """Accuracy and Fréchet distance of samples [n, 16, 16] drawn for ``labels`` [n]."""
    real = classifier.features(digits.digits("train")[0])
    accuracy = (classifier.predict(images) == labels).float().mean().item()
    return Quality(accuracy, frechet_distance(classifier.features(images), real))


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to two sets of features [n, d] and [m, d].

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), covariances A, B (Heusel et al. 2017); float64.
    """
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)


if __name__ == "__main__":
    torch.set_num_threads(2)
    typer.run(main)
