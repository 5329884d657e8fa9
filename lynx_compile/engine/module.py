# SPDX-License-Identifier: Apache-2.0
"""An engine in the place of a diffusers transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from lynx_compile.engine.runtime import Engine
from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
}


def load(
    path: str | Path, *, device: int = 0, cuda_graph: bool = False, progress: Progress | None = None
) -> FluxEngine:
    """Load an engine as the ``transformer`` of a diffusers pipeline; see ``lynx_compile.load``."""
    engine = Engine.open(path, device=device, progress=progress)
    try:
        family = engine.manifest.source.family
        if family != "flux":
            raise InputError(
                f"{path} is of the family {family!r:.50}, which no pipeline here takes.",
                "Run it with lynx_compile.engine.runtime.Engine.",
            )
        return FluxEngine(engine, cuda_graph)
    except BaseException:
        engine.close()
        raise


class FluxEngine(torch.nn.Module):
    """``FluxTransformer2DModel`` for a pipeline that only runs it: no parameters, LoRA, ControlNet or IP adapter.

    ``engine``: what runs. ``config``: of the model that was compiled.
    """

    def __init__(self, engine: Engine, cuda_graph: bool = False) -> None:
        super().__init__()
        self.engine = engine
        self.config = FrozenDict(engine.manifest.source.config)
        self._context = engine.context(cuda_graph=cuda_graph)

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's weights and activations."""
        return DTYPES[self.engine.manifest.dtype]

    @property
    def device(self) -> torch.device:
        """The GPU that the engine is on."""
        return torch.device("cuda", self.engine.device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what runs is TensorRT's: there is nothing to trace
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """The velocity [batch, image tokens, channels], in the dtype and on the device of ``hidden_states``.

        Takes what ``FluxTransformer2DModel.forward`` takes, at the engine's shapes. Inputs of another dtype than
        the engine's are converted. On the GPU it runs in torch's current stream and does not wait; tensors in host
        memory are copied.

        Raises:
            InputError: a shape is not the engine's, an input is missing, or an argument asks for what was not
                compiled in. EngineError: the run fails.
        """
        if joint_attention_kwargs:
            _refuse("joint_attention_kwargs", ", ".join(map(str, joint_attention_kwargs)))
        if controlnet_block_samples is not None or controlnet_single_block_samples is not None:
            _refuse("ControlNet's samples")
        given = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep,
            "img_ids": _without_batch(img_ids),
            "txt_ids": _without_batch(txt_ids),
            "guidance": guidance,
        }
        dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in self.engine.inputs}
        inputs = {
            name: value.detach().to(hidden_states.device, dtypes.get(name, value.dtype)).contiguous()
            for name, value in given.items()
            if value is not None
        }
        velocity = self._run(inputs, hidden_states.device).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Nothing: an engine has no caches that conditional and unconditional runs would have to keep apart."""
        yield

    def to(self, *arguments: Any, **keywords: Any) -> FluxEngine:
        """Itself, if that asks for nothing else than what the engine is.

        Raises:
            InputError: it asks for another device or dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **keywords)
        if device is not None and (device.type != "cuda" or device.index not in (None, self.engine.device)):
            raise InputError(
                f"The engine is on {self.device} and cannot move to {device}.",
                f"Move the pipeline to {self.device}, or load the engine with device=.",
            )
        if dtype is not None and dtype != self.dtype:
            raise InputError(
                f"The engine computes in {self.dtype} and cannot turn to {dtype}.",
                "Compile it with another model.dtype.",
            )
        return self

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def _run(self, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Outputs are torch's: their memory goes back to its allocator, which knows of its streams."""
        (output,) = self.engine.outputs
        batch = inputs["hidden_states"].shape[:2]
        shape = [*batch, *output.shape[2:]]
        velocity = torch.empty(shape, dtype=DTYPES[output.dtype], device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        self._context.run(inputs, outputs={output.name: velocity}, stream=stream)
        return velocity


def _without_batch(ids: torch.Tensor | None) -> torch.Tensor | None:
    """Position ids [tokens, 3]; older pipelines repeat them for every image."""
    return ids[0] if ids is not None and ids.ndim == 3 else ids


def _refuse(what: str, which: str = "") -> NoReturn:
    raise InputError(
        f"A compiled transformer takes no {what}{f' ({which})' if which else ''}.",
        "Merge adapters into the checkpoint before it is compiled.",
    )
