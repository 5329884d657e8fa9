# SPDX-License-Identifier: Apache-2.0
"""The data: two sets of emoji at 32 x 32 on white, each image with the texts that describe it, as one safetensors file.

``python -m calib.emoji_flux.data emoji.safetensors [--packages FOLDER]`` from the repository's root. Fetches the npm
packages ``emoji-datasource-twitter`` and ``emoji-datasource-google`` with ``npm pack``, or takes their archives from
FOLDER. The pictures are Twemoji (CC BY 4.0) and Noto Emoji (Apache-2.0), the names Unicode's.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

STYLES = ("twitter", "google")
VERSION = "16.0.0"
SIZE = 32  # pixels along a side
PATCH = 2  # a token packs PATCH x PATCH pixels
SIDE = SIZE // PATCH  # tokens along a side
CHANNELS = 3
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium light",
    "1F3FD": "medium",
    "1F3FE": "medium dark",
    "1F3FF": "dark",
}
TONED_WEIGHT = 0.35  # how often an image of another skin tone is drawn: half of all images are such
HELD_OUT_EVERY = 61  # one of so many images is not trained on


@dataclass(frozen=True)
class Emoji:
    """``images`` [n, 3, 32, 32] uint8; ``texts`` describe each, the name first; ``weights`` [n], 0 is held out."""

    images: torch.Tensor
    texts: list[list[str]]
    weights: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--packages", type=Path, help="where the archives of both packages are")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.packages or fetch(Path(scratch))
        emoji = read_packages(folder)
    save(emoji, arguments.output)
    held_out = int((emoji.weights == 0).sum())
    print(f"{len(emoji.images)} images, {held_out} of them held out, {len(vocabulary(emoji.texts))} words")


def fetch(folder: Path) -> Path:
    """Both packages' archives from the npm registry, by its own client."""
    names = [f"emoji-datasource-{style}@{VERSION}" for style in STYLES]
    subprocess.run(["npm", "pack", "--silent", *names], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def read_packages(folder: Path) -> Emoji:
    """Every image of both sets, with its texts: style first, then the name or a short name, then the skin tone."""
    images, texts, weights = [], [], []
    for style in STYLES:
        with tarfile.open(folder / f"emoji-datasource-{style}-{VERSION}.tgz") as archive:
            files = {m.name: m for m in archive.getmembers() if m.isfile()}
            entries = json.load(_open(archive, files["package/emoji.json"]))
            for described in entries:
                for variant, tones in _variants(described):
                    member = files[f"package/img/{style}/64/{variant['image']}"]
                    images.append(_image(_open(archive, member).read()))
                    texts.append([f"{style} {text}{tones}" for text in _names(described)])
                    weights.append(TONED_WEIGHT if tones else 1.0)
    kept = torch.tensor(weights)
    kept[torch.arange(len(kept)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] = 0
    return Emoji(torch.stack(images), texts, kept)


def _variants(described: dict) -> Iterator[tuple[dict, str]]:
    yield described, ""
    for code, variant in described.get("skin_variations", {}).items():
        yield variant, "".join(f" {SKIN_TONES[tone]} skin" for tone in code.split("-"))


def _names(described: dict) -> list[str]:
    """The name and the short names as plain words, each once."""
    return list(
        dict.fromkeys(" ".join(words(text)) for text in (described["name"], *described["short_names"]))
    )


def _open(archive: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedIOBase:
    file = archive.extractfile(member)
    assert file is not None  # it is a file
    return file


def _image(png: bytes) -> torch.Tensor:
    """A PNG of 64 x 64 with alpha to [3, 32, 32] uint8 on white, by the mean of 2 x 2 pixels."""
    import numpy as np  # only making the data needs these, not drawing
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        rgba = torch.from_numpy(np.array(image.convert("RGBA"))).float()
    alpha = rgba[..., 3:] / 255
    on_white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    small = torch.nn.functional.interpolate(on_white.permute(2, 0, 1)[None], size=(SIZE, SIZE), mode="area")
    return small[0].round().to(torch.uint8)


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order."""
    return re.findall(r"[a-z0-9]+", text.lower())


def vocabulary(texts: list[list[str]]) -> list[str]:
    """Every word of the texts, sorted."""
    return sorted({word for some in texts for text in some for word in words(text)})


def save(emoji: Emoji, path: Path) -> None:
    tensors = {"images": emoji.images, "weights": emoji.weights}
    save_file(tensors, path, {"texts": json.dumps(emoji.texts)})


def load(path: Path) -> Emoji:
    """Read what ``save`` wrote."""
    with safe_open(path, "pt") as file:
        texts = json.loads(file.metadata()["texts"])
        return Emoji(file.get_tensor("images"), texts, file.get_tensor("weights"))


def pack(images: torch.Tensor) -> torch.Tensor:
    """Images [n, 3, 32, 32] in [0, 1] to latents [n, 256, 12] in [-1, 1], in the order of ``FluxPipeline``."""
    patches = (2 * images - 1).reshape(-1, CHANNELS, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, SIDE * SIDE, CHANNELS * PATCH * PATCH)


def unpack(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack``; values are not clipped."""
    patches = latents.reshape(-1, SIDE, SIDE, CHANNELS, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return (patches.reshape(-1, CHANNELS, SIZE, SIZE) + 1) / 2


if __name__ == "__main__":
    main()
