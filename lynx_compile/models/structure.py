# SPDX-License-Identifier: Apache-2.0
"""The linears of any module, from one run without weights: which tensor each reads, how often, and which may be sparse.

Nothing here knows a class or a name. A linear is a ``torch.nn.Linear`` or a convolution of kernel 1, which does the
same to every pixel. A block is a member of a list of modules that hold several linears each. Candidates are the
linears of blocks that read tokens; what stands before, between and behind the blocks (embedders, final projections)
and what reads no tokens or one row a sample (modulation) is small and sensitive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lynx_compile.engine.arguments import bind, parameters, spread
from lynx_compile.errors import InputError, first_line
from lynx_compile.models.weightless import Weightless

FEWEST_LINEARS = 2  # of a block
IN_MULTIPLE, OUT_MULTIPLE = 16, 8  # what the kernels ask of K and N


@dataclass(frozen=True)
class Linear:
    """A linear layer: its module path, K and N, and why it can not be sparse (None: it can).

    ``convolution``: whether it is one of kernel 1, whose tensors are [batch, channels, pixels ...].
    """

    path: str
    in_channels: int
    out_channels: int
    bias: bool
    refusal: str | None
    convolution: bool = False


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same tensors, in the order they are called. They are pruned once, together.

    ``name`` is the path of the first reader, also where that linear itself stays dense. ``tokens``: rows of the tensor
    in the compiled call, the whole batch; of the largest where there are several. ``calls``: rows of each tensor where
    the linears are called several times; then they are one weight and as many nodes.
    """

    name: str
    linears: tuple[Linear, ...]
    tokens: int
    calls: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def in_channels(self) -> int:
        return self.linears[0].in_channels


@dataclass(frozen=True)
class Structure:
    """Every linear that a call runs, by the tensors it reads, in the order of the calls.

    ``tokens``: rows of the largest tensor that a linear of a block reads, the whole batch: the latent tokens, with
    those of the text where both are one sequence. ``blocks``: paths of the lists of blocks. ``idle``: linears that
    the call does not run. ``with_weights``: whether the module had to be run with weights, whose values it asks for.
    """

    groups: tuple[LinearGroup, ...]
    tokens: int
    blocks: tuple[str, ...]
    idle: tuple[str, ...]
    with_weights: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def candidates(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in self.linears if linear.refusal is None)


def find_structure(
    module: torch.nn.Module,
    arguments: Mapping[str, Any],
    loaded: Callable[[], torch.nn.Module] | None = None,
) -> Structure:
    """Run ``module`` once and see which linear reads which tensor.

    Args:
        module: made on the meta device (``with torch.device("meta")``), so that there are no weights; one that has
            them is run as it is.
        arguments: of its ``forward``, by name, nested as it takes them; real tensors, since a module may look at them.
        loaded: gives the module with weights, for one that looks at values that depend on them.

    Raises:
        InputError: the call does not fit the module, or it looks at weights and there are none.
    """
    with_weights = not _is_weightless(module)
    try:
        reads = _reads(module, arguments)
    except InputError:
        raise
    except Exception as error:  # whatever torch says of a value that is not there
        if loaded is None or with_weights:
            raise InputError(
                f"The module {type(module).__name__} cannot be run without its weights ({first_line(error)}).",
                "Check the arguments of its call; a module that decides by what its weights give must be loaded first.",
            ) from error
        module, with_weights = loaded(), True
        reads = _reads(module, arguments)
    blocks = block_lists(module)
    shapes = [read.shape for path, calls in reads.items() if _inside(path, blocks) for read in calls]
    tokens = max(map(_rows, shapes), default=0)
    batch = min((shape[0] for shape in shapes if _rows(shape) == tokens and len(shape) > 2), default=1)
    found = {
        path: _linear(path, module.get_submodule(path), calls, blocks, batch) for path, calls in reads.items()
    }
    idle = tuple(path for path, linear in module.named_modules() if is_linear(linear) and path not in reads)
    return Structure(_groups(found, reads), tokens, blocks, idle, with_weights)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module does the same linear map to every token or pixel."""
    return isinstance(module, torch.nn.Linear) or is_pointwise(module)


def is_pointwise(module: torch.nn.Module) -> bool:
    """Whether a module is a convolution of kernel 1 over all channels."""
    if not isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return False
    no_padding = module.padding == "valid" or module.padding == "same" or not any(module.padding)
    return {*module.kernel_size, *module.stride, module.groups} == {1} and no_padding


def block_lists(module: torch.nn.Module) -> tuple[str, ...]:
    """Paths of the lists whose members hold several linears each."""
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    return tuple(
        path
        for path, found in module.named_modules()
        if isinstance(found, lists)
        and len(found)
        and all(sum(map(is_linear, member.modules())) >= FEWEST_LINEARS for member in found)
    )


@dataclass(frozen=True)
class _Read:
    """A tensor that a linear reads: itself (its identity counts), its shape with the channels last, and whether its
    values depend on tokens.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    of_tokens: bool


def _reads(module: torch.nn.Module, arguments: Mapping[str, Any]) -> dict[str, list[_Read]]:
    """What every linear reads in one call, by path, in the order of the first calls."""
    known = parameters(module.forward)
    args, kwargs = spread(known, bind(known, (), arguments))
    reads: dict[str, list[_Read]] = {}
    with ExitStack() as stack:
        run = stack.enter_context(Weightless(arguments)) if _is_weightless(module) else None
        stack.enter_context(torch.no_grad())
        stack.enter_context(_hooked(module, run, reads))
        module(*args, **kwargs)
    return reads


def _is_weightless(module: torch.nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def _hooked(module: torch.nn.Module, run: Weightless | None, reads: dict[str, list[_Read]]) -> Iterator[None]:
    """Note what every linear reads; with weights, everything counts as depending on tokens."""

    def hook(path: str) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(linear: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: torch.Tensor = args[0] if args else kwargs["input"]
            shape = tuple(x.shape if isinstance(linear, torch.nn.Linear) else x.movedim(1, -1).shape)
            reads.setdefault(path, []).append(_Read(x, shape, run is None or run.is_of_tokens(x)))

        return note

    handles = [
        linear.register_forward_pre_hook(hook(path), with_kwargs=True)
        for path, linear in module.named_modules()
        if is_linear(linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inside(path: str, blocks: Sequence[str]) -> bool:
    return any(path.startswith(f"{block}.") for block in blocks)


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def _linear(path: str, module: Any, calls: Sequence[_Read], blocks: Sequence[str], batch: int) -> Linear:
    convolution = not isinstance(module, torch.nn.Linear)
    sizes = (
        (module.in_channels, module.out_channels)
        if convolution
        else (module.in_features, module.out_features)
    )
    if not _inside(path, blocks):
        refusal: str | None = "outside of the repeated blocks: embedder, modulation or final projection"
    elif not any(read.of_tokens for read in calls):
        refusal = "reads what depends on no tokens: modulation"
    elif (rows := max(_rows(read.shape) for read in calls)) <= batch:
        refusal = f"reads {rows} row{'s' * (rows != 1)}, one a sample or fewer: modulation"
    else:
        refusal = _of_sizes(*sizes)
    return Linear(path, *sizes, module.bias is not None, refusal, convolution)


def _of_sizes(in_channels: int, out_channels: int) -> str | None:
    """Why the kernels do not take a linear of such sizes, or None."""
    if not in_channels or not out_channels:
        return "it has no channels"
    if in_channels % IN_MULTIPLE:
        return f"K = {in_channels} is not divisible by {IN_MULTIPLE}"
    if out_channels % OUT_MULTIPLE:
        return f"N = {out_channels} is not divisible by {OUT_MULTIPLE}"
    return None


def _groups(found: Mapping[str, Linear], reads: Mapping[str, Sequence[_Read]]) -> tuple[LinearGroup, ...]:
    """Linears by the tensors they read: all of them, in order. ``reads`` keeps the tensors, so no id comes twice."""
    members: dict[tuple[int, ...], list[str]] = {}
    for path, calls in reads.items():
        members.setdefault(tuple(id(read.tensor) for read in calls), []).append(path)
    groups = []
    for paths in members.values():
        rows = tuple(_rows(read.shape) for read in reads[paths[0]])
        linears = tuple(found[path] for path in paths)
        groups.append(LinearGroup(paths[0], linears, max(rows), calls=rows if len(rows) > 1 else ()))
    return tuple(groups)
