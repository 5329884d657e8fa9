# SPDX-License-Identifier: Apache-2.0
"""An ONNX transformer where a checkpoint of a torch module is expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lynx_compile.engine.arguments import flatten
from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.models.onnx_model import OnnxCheckpoint
from lynx_compile.models.onnx_module import build_module


@dataclass(frozen=True)
class OnnxSource:
    """``scratch``: folder for the float32 copy that calibration runs."""

    onnx: OnnxCheckpoint
    scratch: Path

    @property
    def folder(self) -> Path:
        return self.onnx.path

    @property
    def class_name(self) -> str:
        return "onnx"

    @property
    def config(self) -> Mapping[str, Any]:
        return {}

    def digest(self, progress: Progress = no_progress) -> str:
        """SHA-256 over the file and its external data."""
        return self.onnx.digest(progress)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """``PATH.weight`` [N, K] or ``PATH.bias`` [N] of a linear."""
        return self.onnx.tensor(name).to(dtype)

    def check_values(self, dtype: torch.dtype, progress: Progress = no_progress) -> None:
        """Nothing: its weights have the engine's dtype already, and ONNX Runtime runs them."""

    def build(self, device: str = "meta", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """A module that runs nothing but the hooks of its linears."""
        return build_module(self.onnx, "meta", self.scratch)

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
        """A module that ONNX Runtime runs in float32 on the CPU; weights have the file's dtype."""
        return build_module(self.onnx, "cpu", self.scratch)

    def taken(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The graph's inputs out of a recorded call, in the graph's dtypes.

        Raises:
            InputError: the call lacks one, or has another shape.
        """
        tensors = flatten(arguments).tensors
        for tensor in self.onnx.inputs:
            found = tensors.get(tensor.name)
            if found is None or tuple(found.shape) != tensor.shape:
                given = "is not in the recording" if found is None else f"has shape {list(found.shape)} there"
                raise InputError(
                    f"{self.onnx.path} takes '{tensor.name}' {list(tensor.shape)}, which {given}.",
                    "Record calls of the same model at the same shapes; inputs are named as the recording's tensors.",
                )
        return {tensor.name: tensors[tensor.name].to(tensor.dtype) for tensor in self.onnx.inputs}
