# SPDX-License-Identifier: Apache-2.0
"""The text encoder, such as it is: a table of word vectors, learned with the transformer, and one of positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from calib.emoji_flux import data

TOKENS = 12  # of a prompt; what is longer is cut, what is shorter filled with zeros
DIM = 64  # of a word's vector


class WordTable(nn.Module):
    """Prompts as the transformer takes them. Word 0 is no word: its vector is zero, wherever it stands."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.vocabulary = list(vocabulary)
        self.words = nn.Parameter(torch.randn(len(vocabulary) + 1, DIM))
        self.positions = nn.Parameter(torch.zeros(TOKENS, DIM))

    def ids(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to word numbers [n, 12] int64.

        Raises:
            ValueError: a word is not in the vocabulary.
        """
        numbers = {word: i for i, word in enumerate(self.vocabulary, 1)}
        rows = torch.zeros(len(texts), TOKENS, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            found = data.words(text)[:TOKENS]
            if unknown := [word for word in found if word not in numbers]:
                raise ValueError(f"'{unknown[0]}' is no word of an emoji's name (in '{text}').")
            row[: len(found)] = torch.tensor([numbers[word] for word in found], dtype=torch.long)
        return rows

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """[n, 12] to ``encoder_hidden_states`` [n, 12, 64] and ``pooled_projections`` [n, 64], the words' sum at rms 1.

        A row without words is the prompt of classifier-free guidance: all zeros.
        """
        there = (ids > 0)[..., None].to(self.words.dtype)
        vectors = self.words[ids]
        count = there.sum(dim=1).clamp(min=1)
        return {
            "encoder_hidden_states": (vectors + self.positions) * there,
            "pooled_projections": (vectors * there).sum(dim=1) / count.sqrt(),
        }

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Texts to what ``forward`` gives of them."""
        with torch.no_grad():
            return self(self.ids(texts).to(self.words.device))

    def save(self, path: Path) -> None:
        tensors = {k: v.detach().half().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, path, {"vocabulary": json.dumps(self.vocabulary)})

    @classmethod
    def load(cls, path: Path) -> WordTable:
        """Read what ``save`` wrote, as float32."""
        with safe_open(path, "pt") as file:
            table = cls(json.loads(file.metadata()["vocabulary"]))
            table.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return table.requires_grad_(False)
