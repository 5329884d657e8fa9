# SPDX-License-Identifier: Apache-2.0
"""An ONNX transformer as a torch module, so that what measures modules by hooks on their linears measures it too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from lynx_compile.files.float32 import float32_copy
from lynx_compile.models.onnx_model import OnnxCheckpoint, OnnxLinear


def build_module(checkpoint: OnnxCheckpoint, device: str, folder: Path) -> torch.nn.Module:
    """A module whose ``forward`` takes the graph's inputs by name, and whose linears have the graph's names.

    On the meta device a call runs nothing but the hooks of the linears, with tensors of the right shapes. On the CPU
    ONNX Runtime runs the graph in float32, and the hooks see what each linear reads. A linear's own ``forward`` is
    never needed: called, it gives back what it reads.

    Args:
        device: ``meta``, or ``cpu``: weights are mapped from the file, in its dtype.
        folder: for the float32 copy of the graph that ONNX Runtime runs.
    """
    names = [tensor.name for tensor in checkpoint.inputs]

    def forward(self: OnnxModule, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        return self.run(dict(zip(names, args, strict=False)) | kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in ("self", *names)])  # type: ignore[attr-defined]
    made: type[OnnxModule] = type("OnnxModule", (OnnxModule,), {"forward": forward})
    return made(checkpoint, device, folder).eval().requires_grad_(False)


class OnnxModule(torch.nn.Module):
    """See ``build_module``, which gives it the ``forward`` of its graph."""

    def __init__(self, checkpoint: OnnxCheckpoint, device: str, folder: Path) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._folder = folder
        self._readers = {linear.path: _Reader(checkpoint, linear, device) for linear in checkpoint.linears}
        _plant(self, self._readers)
        self._on_meta = device == "meta"
        self._session: tuple[tuple[str, ...], onnxruntime.InferenceSession] | None = None

    def run(self, arguments: Mapping[str, torch.Tensor]) -> Any:
        """The graph's output, or a tuple of several; the hooks of linears are called on the way."""
        watched = [
            linear for linear in self._checkpoint.linears if self._readers[linear.path]._forward_pre_hooks
        ]
        names = tuple(dict.fromkeys(linear.reads for linear in watched))
        outputs, read = self._meta(watched, arguments) if self._on_meta else self._run(names, arguments)
        for linear in watched:
            self._readers[linear.path](read[linear.reads])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _meta(
        self, watched: Sequence[OnnxLinear], arguments: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Tensors of the right shapes that come from the right inputs, for those who follow what depends on what."""
        sums = {name: value.sum() for name, value in arguments.items()}
        nothing = self._readers[self._checkpoint.linears[0].path].weight
        read = {}
        for linear in {linear.reads: linear for linear in watched}.values():
            read[linear.reads] = nothing.new_empty(linear.shape)
            for name in linear.depends:
                read[linear.reads] = read[linear.reads] + sums[name].to(nothing.device)
        made = [nothing.new_empty(tensor.shape, dtype=tensor.dtype) for tensor in self._checkpoint.outputs]
        return made, read

    def _run(
        self, names: tuple[str, ...], arguments: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        if self._session is None or self._session[0] != names:
            self._session = None  # two of them would hold the weights twice
            self._session = (names, self._opened(names))
        feed = {
            tensor.name: arguments[tensor.name]
            .detach()
            .to("cpu", _widened(tensor.dtype))
            .contiguous()
            .numpy()
            for tensor in self._checkpoint.inputs
        }
        wanted = [tensor.name for tensor in self._checkpoint.outputs]
        found = [torch.from_numpy(value) for value in self._session[1].run([*wanted, *names], feed)]
        outputs = [
            value.to(tensor.dtype) for value, tensor in zip(found, self._checkpoint.outputs, strict=False)
        ]
        return outputs, dict(zip(names, found[len(wanted) :], strict=True))

    def _opened(self, names: Sequence[str]) -> onnxruntime.InferenceSession:
        """A session of the float32 copy that also gives out the values ``names``."""
        path = self._copy.with_name("watched.onnx")
        model = onnx.load(self._copy, load_external_data=False)
        for name in set(names) - {value.name for value in (*model.graph.output, *model.graph.input)}:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        onnx.save(model, path)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    @cached_property
    def _copy(self) -> Path:
        """In float32, of the graph as its linears were found; the user's own file may call values otherwise."""
        prepared = self._folder / "prepared.onnx"
        self._checkpoint.save(prepared)
        copy = float32_copy(prepared, self._folder / "float32.onnx")
        for path in self._folder.glob("prepared.onnx*"):
            path.unlink()
        return copy


class _Reader(torch.nn.Linear):
    """A linear of the graph, of which only the weights and the hooks are used."""

    def __init__(self, checkpoint: OnnxCheckpoint, linear: OnnxLinear, device: str) -> None:
        super().__init__(linear.in_channels, linear.out_channels, linear.bias is not None, device="meta")
        if device != "meta":
            self.weight = torch.nn.Parameter(checkpoint.tensor(f"{linear.path}.weight"), requires_grad=False)
            if linear.bias is not None:
                self.bias = torch.nn.Parameter(checkpoint.tensor(f"{linear.path}.bias"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _plant(root: torch.nn.Module, readers: Mapping[str, torch.nn.Module]) -> None:
    """Put every linear at its path; what holds only numbered members is a list, as blocks are in a module."""
    for path, reader in readers.items():
        parent, name = root, ""
        *above, name = path.split(".")
        for depth, part in enumerate(above):
            if part not in parent._modules:
                after = {
                    p.split(".")[depth + 1]
                    for p in readers
                    if p.split(".")[: depth + 1] == above[: depth + 1]
                }
                blocks = all(member.isdigit() for member in after)
                parent.add_module(part, torch.nn.ModuleList() if blocks else torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, reader)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
