# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/, run on tiny models in the place of their checkpoints."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lynx_compile

EXAMPLES = Path(__file__).parents[1] / "examples"
ENCODERS = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "processor")
Encode = Callable[..., tuple[torch.Tensor, ...]]


def without_encoders(
    pipeline: type[Any], encode: Encode, monkeypatch: pytest.MonkeyPatch, **loading: Any
) -> None:
    """``pipeline`` loads without text encoders, and ``encode`` takes the place of what runs them.

    ``loading``: arguments of ``from_pretrained`` that win over those given.
    """
    absent = dict.fromkeys(name for name in pipeline._get_signature_types() if name.startswith(ENCODERS))
    loaded = pipeline.from_pretrained
    monkeypatch.setattr(
        pipeline, "from_pretrained", lambda folder, **given: loaded(folder, **absent | given | loading)
    )
    monkeypatch.setattr(pipeline, "encode_prompt", encode)


def encoded(pipe: Any, prompts: str | Sequence[str], *shape: int) -> torch.Tensor:
    """In a text encoder's place: random tensors of that shape, the same for the same prompt."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
    return torch.stack(rows).to(pipe.transformer.dtype)


def hold(
    program: str, arguments: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch
) -> np.ndarray[Any, Any]:
    """Run a program, and see that the compiled linears have drawn: [frames, height, width, 3], by the last argument."""
    compiled = _drawn(program, arguments, monkeypatch)
    assert np.array_equal(compiled, _drawn(program, arguments, monkeypatch)), (
        "the same seed, the same picture"
    )
    with monkeypatch.context() as patch:
        patch.setattr(lynx_compile, "apply", lambda module, path: module)
        dense = _drawn(program, arguments, patch)
    assert compiled.shape == dense.shape and not np.array_equal(compiled, dense)
    return compiled


def _drawn(
    program: str, arguments: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch
) -> np.ndarray[Any, Any]:
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / program), run_name="__main__")
    with Image.open(arguments[-1]) as image:
        frames = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)
