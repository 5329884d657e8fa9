# SPDX-License-Identifier: Apache-2.0
"""``lynx_compile.apply`` and ``restore``: what was compiled, in the torch module that it was compiled from."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lynx_compile.engine.manifest import Manifest, SparseLinears
from lynx_compile.errors import InputError
from lynx_compile.files.digest import file_digest
from lynx_compile.files.outputs import Outputs
from lynx_compile.ops import fp8
from lynx_compile.ops.fp8 import E4M3, ROW_STEP
from lynx_compile.ops.sparse_linear import GELU_TANH, padded_width
from lynx_compile.ops.sparse_weight_linear import (
    STEP,
    MetadataLayout,
    gated_order,
    pack_weight,
    relaid,
    unpack_weight,
)
from lynx_compile.torch_ops.epilogue import NO_EPILOGUE, Epilogue
from lynx_compile.torch_ops.module_gates import ModuleGate, find_gate
from lynx_compile.torch_ops.modules import Fp8Linear, SparseActivationLinear, SparseWeightLinear
from lynx_compile.torch_ops.operators import kernels_run, metadata_layout
from lynx_compile.torch_ops.swap import Change, Group, gelu_behind, is_gate_last, merge, undo

APPLIED = "_lynx_applied"  # attribute of a module
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
log = logging.getLogger(__name__)
LORA = ("load_lora_adapter", "add_adapter", "load_lora_weights", "fuse_lora")  # methods that change linears
_AGAIN = "Compile the model again; stages that have not changed are not run."


@dataclass
class Applied:
    """What ``restore`` puts back: changes in their order, hidden methods; and whether it can."""

    engine: Path
    changes: list[Change]
    hidden: list[str]
    restorable: bool


def apply(module: nn.Module, path: Path, *, restorable: bool = True) -> nn.Module:
    """Put an engine's linears into the module; see ``lynx_compile.apply``."""
    if hasattr(module, APPLIED):
        raise InputError(
            "There are compiled linears in this module already.", "Call lynx_compile.restore(module) first."
        )
    outputs = Outputs.find(path)
    manifest = Manifest.read(outputs.manifest)
    _check_module(module, manifest, outputs.manifest)
    weights = _weights_file(manifest, outputs.manifest.parent)
    applied = Applied(path, [], [], restorable)
    done: set[str] = set()
    try:
        with safe_open(weights, framework="pt") as file:
            for node in manifest.sparse:
                if done.isdisjoint(node.linears):  # a linear that is called several times has several nodes
                    _put(module, node, _Reader(file, weights, node), DTYPES[manifest.dtype], applied)
                done |= set(node.linears)
    except BaseException as error:
        _follow(applied.changes)
        undo(module, applied.changes)
        if isinstance(error, SafetensorError):
            raise InputError(f"{weights} is no safetensors file ({error!s:.200}).", _AGAIN) from None
        raise
    hidden = dict.fromkeys(LORA, _refuse) | {"state_dict": MethodType(_state_dict, module)}
    for name in (name for name in hidden if hasattr(module, name)):
        setattr(module, name, hidden[name])
        applied.hidden.append(name)
    if not restorable:
        applied.changes.clear()
    object.__setattr__(module, APPLIED, applied)
    return module


def restore(module: nn.Module) -> nn.Module:
    """Undo ``apply``; see ``lynx_compile.restore``."""
    applied: Applied | None = module.__dict__.get(APPLIED)
    if applied is None:
        raise InputError("There are no compiled linears in this module.", "Call lynx_compile.apply first.")
    if not applied.restorable:
        raise InputError(
            "The module's own linears were not kept.", "Load it anew, or apply with restorable=True."
        )
    _follow(applied.changes)
    undo(module, applied.changes)
    for name in applied.hidden:
        delattr(module, name)
    delattr(module, APPLIED)
    return module


def compiled_linears(path: Path) -> Iterator[tuple[SparseLinears, nn.Module]]:
    """An engine's nodes as modules of their own, each a product and a bias: what a node does behind is left out.

    Raises:
        InputError: a file is missing or damaged.
    """
    outputs = Outputs.find(path)
    manifest = Manifest.read(outputs.manifest)
    weights = _weights_file(manifest, outputs.manifest.parent)
    done: set[str] = set()
    with safe_open(weights, framework="pt") as file:
        for node in manifest.sparse:
            if done.isdisjoint(node.linears):
                make = _KINDS[node.fp8, node.operand == "weight"]
                yield node, make(node, _Reader(file, weights, node), DTYPES[manifest.dtype], NO_EPILOGUE)
            done |= set(node.linears)


def _refuse(*_: object, **__: object) -> None:
    raise InputError(
        "A LoRA cannot be loaded into compiled linears.",
        "Call lynx_compile.restore, load the LoRA, and apply again: it then stays beside the compiled linears.",
    )


class _StateDict(OrderedDict[str, Any]):
    """A module's tensors, in which who asks for a compiled linear's weight learns why it is not there.

    So does FLUX's pipeline, which looks at the linears before it loads a LoRA into them.
    """

    def __missing__(self, key: str) -> Any:
        readers = {name.partition(".merged.")[0] for name in self if ".merged." in name}
        if any(key.startswith(f"{reader}.") for reader in readers):
            _refuse()
        raise KeyError(key)


def _state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    own = type(module).state_dict(module, *args, **kwargs)
    found = _StateDict(own)
    found._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    return found


def _check_module(module: nn.Module, manifest: Manifest, path: Path) -> None:
    """That the module is the one that was compiled, as far as its class and linears tell."""
    family = manifest.source.family
    if type(module).__name__ not in (family, family.rpartition(":")[2]):
        raise InputError(
            f"{path} was compiled from {family}, and the module is {type(module).__name__}.",
            "Load the transformer that the recipe names.",
        )
    adapters = [each for each in module.modules() if hasattr(each, "base_layer")]
    fused = any(getattr(each, "merged", False) for each in adapters)
    folded = manifest.source.loras
    if folded and adapters and not fused:
        raise InputError(
            f"{path} was compiled with {', '.join(folded)} in its weights, and the module has a LoRA beside them.",
            "Call pipe.fuse_lora() first, so that linears that stay dense have it too, and none has it twice.",
        )
    if folded and not fused:
        log.warning(
            "%s was compiled with %s in its weights: linears that stay dense have it only where it was fused into the "
            "module before (pipe.load_lora_weights, pipe.fuse_lora)",
            path, ", ".join(folded),
        )  # fmt: skip
    if fused and not folded:
        raise InputError(
            "A LoRA is fused into the module's linears, and compiled ones would not have it.",
            "Call pipe.unfuse_lora() first: a LoRA that is loaded and not fused stays beside compiled linears.",
        )
    if any(_offloads(each) for each in module.modules()):
        raise InputError(
            "The module is offloaded in groups, which do not know of new linears.",
            "Call lynx_compile.apply first, then enable_group_offload.",
        )
    if any(getattr(each, "fused_projections", False) for each in module.modules()):
        raise InputError(
            "The module's projections are fused, so that it does not call the linears that were compiled.",
            "Call module.unfuse_qkv_projections() first.",
        )
    for node in manifest.sparse:
        if len(node.sizes) != len(node.linears):
            raise InputError(f"{path} does not tell how its linears are laid out.", _AGAIN)
        for linear, size in zip(node.linears, node.sizes, strict=True):
            found = _at(module, _own(module, linear))
            shape = tuple(found.weight.shape[:2]) if isinstance(found, nn.Linear | nn.Conv2d) else None
            if shape != (size, node.in_channels):
                raise InputError(
                    f"{path} has {linear} as a linear of {node.in_channels} -> {size} channels, and the module's is "
                    f"{'none' if shape is None else f'{shape[1]} -> {shape[0]}'}.",
                    "Load the transformer that the recipe names.",
                )
            if found is not None and found.weight.dtype != DTYPES[manifest.dtype]:
                raise InputError(
                    f"{path} computes in {manifest.dtype}, and the module's {linear} is in {found.weight.dtype}.",
                    f"Load it with dtype={DTYPES[manifest.dtype]}.",
                )


def _offloads(module: nn.Module) -> bool:
    """Whether diffusers moves its tensors, or some of them, for each call."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


def _at(module: nn.Module, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _weights_file(manifest: Manifest, folder: Path) -> Path:
    """The file with the compiled weights, of which the manifest tells the digest.

    Raises:
        InputError: it is missing, or another one.
    """
    found = next((file for file in manifest.files if file.file.endswith(".safetensors")), None)
    if found is None:
        raise InputError("The manifest names no file of weights.", _AGAIN)
    path = folder / found.file
    if not path.is_file():
        raise InputError(f"{path} does not exist.", "Keep it beside the manifest, or compile again.")
    if path.stat().st_size != found.bytes or file_digest(path) != found.sha256:
        raise InputError(f"{path} is not the file that the manifest was written with.", _AGAIN)
    return path


@dataclass(frozen=True)
class _Reader:
    """A node's tensors in the open weights file, each checked."""

    file: Any
    path: Path
    node: SparseLinears

    def __call__(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        key = f"{self.node.layer}.{name}"
        if key not in self.file.keys():  # noqa: SIM118  # it is no mapping
            raise InputError(f"{self.path} holds no tensor '{key}'.", _AGAIN)
        tensor: torch.Tensor = self.file.get_tensor(key)
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise InputError(
                f"{self.path}: '{key}' is {tensor.dtype} {list(tensor.shape)}, and {dtype} {list(shape)} is due.",
                _AGAIN,
            )
        return tensor


def _put(module: nn.Module, node: SparseLinears, read: _Reader, dtype: torch.dtype, applied: Applied) -> None:
    """One node in the place of its linears."""
    own = tuple(_own(module, path) for path in node.linears)
    adapted = own != node.linears  # an adapter adds to what a linear gives, before any activation
    gate = None if adapted else _gate(module, node)
    epilogue = NO_EPILOGUE if adapted else _epilogue(module, node, gate)
    linear = _KINDS[node.fp8, node.operand == "weight"](node, read, dtype, epilogue)
    first: Any = module.get_submodule(own[0])
    gelu_from = epilogue.first if epilogue.activation else node.out_channels
    group = Group(own, node.sizes, gelu_from, isinstance(first, nn.Conv2d), gate)
    changes = merge(module, group, linear.to(first.weight.device))
    applied.changes += changes
    if applied.restorable:  # at once: the two models need not fit beside each other
        for change in changes:
            if isinstance(change.old, nn.Module):
                change.old.to("cpu")


def _own(module: nn.Module, path: str) -> str:
    """Path of the linear itself where adapters (PEFT's layers) are around it."""
    return f"{path}.base_layer" if hasattr(_at(module, path), "base_layer") else path


def _gate(module: nn.Module, node: SparseLinears) -> ModuleGate | None:
    """The gated activation that the node takes over; None where a module is unknown that makes one."""
    if node.gated is None:
        return None
    gate = find_gate(module, node.linears, node.sizes)
    if gate is None or gate.rows != node.gated:
        return None
    return gate if is_gate_last(Group(node.linears, node.sizes, node.out_channels), gate) else None


def _epilogue(module: nn.Module, node: SparseLinears, gate: ModuleGate | None) -> Epilogue:
    """The node's gate, or a GELU where the modules are known that apply it; else they go on to do so."""
    if gate is not None:
        return Epilogue(gate.activation, node.out_channels - 2 * gate.channels, gated=True)
    if node.activation_from is None:
        return NO_EPILOGUE
    starts = [sum(node.sizes[:index]) for index in range(len(node.sizes))]
    with_gelu = [
        path for path, start in zip(node.linears, starts, strict=True) if start >= node.activation_from
    ]
    known = all(gelu_behind(module, path) for path in with_gelu)
    return Epilogue(GELU_TANH, node.activation_from) if known else NO_EPILOGUE


def _sparse_activation(
    node: SparseLinears, read: _Reader, dtype: torch.dtype, epilogue: Epilogue
) -> nn.Module:
    return SparseActivationLinear(
        read("weight", dtype, (node.out_channels, padded_width(node.in_channels, node.rank))),
        read("lora_down", dtype, (max(node.rank, 1), node.in_channels)),
        read("bias", dtype, (node.out_channels,)),
        rank=node.rank, norm_scale=node.norm_scale, epilogue=epilogue,
    )  # fmt: skip


def _sparse_weight(node: SparseLinears, read: _Reader, dtype: torch.dtype, epilogue: Epilogue) -> nn.Module:
    padded = -(-node.out_channels // STEP) * STEP
    layout = node.metadata_layout
    if layout is None:
        raise InputError(f"The manifest does not tell the layout of {node.layer}.", _AGAIN)
    values = read("values", dtype, (padded, node.in_channels // 2))
    metadata = read("metadata", torch.int32, (node.in_channels // STEP, padded // STEP, 2 * STEP))
    bias = read("bias", dtype, (node.out_channels,))
    if node.gated is not None and not epilogue.gated:
        order = _order(node, epilogue)
        values, metadata = _reordered(values, metadata, layout, order)
        bias = bias[order]
    if kernels_run(dtype) and (here := metadata_layout(dtype)) != layout:
        metadata, layout = relaid(metadata, layout, here), here  # offloading moves tensors one by one
    return SparseWeightLinear(values, metadata, bias, metadata_layout=layout, epilogue=epilogue)


def _order(node: SparseLinears, epilogue: Epilogue) -> torch.Tensor:
    """Which row of a node's weight comes where: as its linears have them, unless the epilogue takes them in pairs."""
    if node.gated is None or epilogue.gated:
        return torch.arange(node.out_channels)
    return torch.tensor(gated_order(node.out_channels, *node.gated)).argsort()


def _reordered(
    values: torch.Tensor, metadata: torch.Tensor, layout: MetadataLayout, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed weight with its rows in another order."""
    weight, keep = (
        unpack_weight(each, metadata, layout)[order] for each in (values, torch.ones_like(values))
    )
    return pack_weight(weight, keep.bool(), layout)


def _fp8_linear(node: SparseLinears, read: _Reader, dtype: torch.dtype, epilogue: Epilogue) -> nn.Module:
    width, order = -(-node.in_channels // fp8.STEP) * fp8.STEP, _order(node, epilogue)
    return Fp8Linear(
        read("weight", torch.int32, (node.out_channels, width // 4))[order].view(E4M3),
        None,
        read("weight_scale", torch.float32, (node.out_channels,))[order],
        read("bias", dtype, (node.out_channels,))[order],
        in_features=node.in_channels, operand="sparse activation" if node.operand == "activation" else "dense",
        epilogue=epilogue,
    )  # fmt: skip


def _fp8_weight(node: SparseLinears, read: _Reader, dtype: torch.dtype, epilogue: Epilogue) -> nn.Module:
    width, order = -(-node.in_channels // fp8.STEP) * fp8.STEP, _order(node, epilogue)
    padded = -(-node.out_channels // ROW_STEP) * ROW_STEP
    rows = torch.cat((order, torch.arange(node.out_channels, padded)))  # metadata lie row by row
    return Fp8Linear(
        read("values", torch.int32, (padded, width // 8))[rows].view(E4M3),
        read("metadata", torch.int32, (width // fp8.STEP, padded, 4))[:, rows],
        read("weight_scale", torch.float32, (node.out_channels,))[order],
        read("bias", dtype, (node.out_channels,))[order],
        in_features=node.in_channels, operand="sparse weight", epilogue=epilogue,
    )  # fmt: skip


_Maker = Callable[[SparseLinears, _Reader, torch.dtype, Epilogue], nn.Module]
_KINDS: dict[tuple[bool, bool], _Maker] = {  # by whether in FP8, and whether the weight is 2:4
    (False, False): _sparse_activation,
    (False, True): _sparse_weight,
    (True, False): _fp8_linear,
    (True, True): _fp8_weight,
}


def _follow(changes: Sequence[Change]) -> None:
    """The module's own linears onto the device where what stands for them is, which gives up its memory first."""
    devices: list[torch.device] = []
    for change in changes:
        tensors = [*change.new.parameters()] if isinstance(change.new, nn.Module) else []
        # What idles since is where its neighbour is.
        devices.append(tensors[0].device if tensors else devices[-1] if devices else torch.device("cpu"))
    for change in changes:
        if isinstance(change.new, nn.Module):
            change.new.to("meta")
    for change, device in zip(changes, devices, strict=True):
        if isinstance(change.old, nn.Module):
            change.old.to(device)
