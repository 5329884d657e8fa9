# SPDX-License-Identifier: Apache-2.0
"""A small convolutional net on the real digits: which digit a sample shows, and features to compare by.

``python -m calib.digits_flux.classifier`` from the repository's root trains and saves it.
"""

from __future__ import annotations

from functools import cache

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn

from calib.digits_flux import digits

WEIGHTS = digits.HERE / "classifier.safetensors"
FEATURES = 64
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 2e-3
SHIFT = 1  # pixels of random translation while training
SEED = 0


def predict(images: torch.Tensor) -> torch.Tensor:
    """The digit seen in each image: [n, 16, 16] in [0, 1] to [n] int64."""
    with torch.inference_mode():
        logits: torch.Tensor = trained().head(features(images))
        return logits.argmax(dim=1)


def features(images: torch.Tensor) -> torch.Tensor:
    """Activations before the last layer, for a Fréchet distance: [n, 16, 16] to [n, 64] float32."""
    with torch.inference_mode():
        activations: torch.Tensor = trained().body(images[:, None].float())
        return activations


@cache
def trained() -> Classifier:
    """The committed weights, loaded once."""
    net = Classifier()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 4 * 4, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, digits.CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 1, 16, 16] to logits [n, 10]."""
        logits: torch.Tensor = self.head(self.body(images))
        return logits


def held_out_accuracy() -> float:
    """Share of the 360 held-out real digits named right."""
    images, labels = digits.digits("held_out")
    return (predict(images) == labels).float().mean().item()


def main() -> None:
    """Train on the real digits, and overwrite the committed weights."""
    torch.manual_seed(SEED)
    save_file(trained_on(*digits.digits("train")).state_dict(), WEIGHTS)
    trained.cache_clear()
    print(f"held-out accuracy {held_out_accuracy():.1%}")


def trained_on(images: torch.Tensor, labels: torch.Tensor) -> Classifier:
    net = Classifier().train()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
        logits = net(images[rows].roll(shift, dims=(1, 2))[:, None])
        loss = nn.functional.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return net


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
