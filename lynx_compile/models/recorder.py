# SPDX-License-Identifier: Apache-2.0
"""The hooks that record one run of a pipeline, and what they refuse because no graph could repeat it."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModularPipeline
from torch.utils._pytree import tree_leaves

from lynx_compile.engine.arguments import Arguments, Parameter, bind, flatten, parameters
from lynx_compile.errors import InputError, LynxError
from lynx_compile.models.recording import Call, Component, schema_key
from lynx_compile.models.recording_writer import SampleWriter, Writer

Pipeline = Any  # a DiffusionPipeline: diffusers declares neither its components nor its call
TIMES = ("timestep", "timesteps", "t", "sigma")  # what forward calls the time, which changes with the step


class Recorder:
    """The hooks of one run of the pipeline."""

    def __init__(
        self,
        pipe: Pipeline,
        modules: Mapping[str, torch.nn.Module],
        writer: Writer,
        named: set[str],
        states: int | None,
        seed: int,
        number: int,
    ) -> None:
        self.sample: SampleWriter = writer.begin(number)
        self.step = 0
        self.counts_steps = False
        self._pipe = pipe
        self._modules = dict(modules)
        self._named = named if writer.components is None else {c.name for c in writer.components}
        self._schemas = set(writer.schemas)
        self._choice = _Choice(states, f"{seed} {number}")
        # Where the last calls are that will be kept, if runs are alike; the first run goes to its end.
        self._last = {name: self._choice.last(name, calls) for name, calls in writer.calls.items()}
        self._calls = dict.fromkeys(modules, 0)
        self._times: dict[str, torch.Tensor] = {}
        self._branches: dict[str, list[str]] = {}  # of the current step
        self._steps: dict[str, int] = {}
        self._contexts: dict[str, str] = {}
        self._found: dict[str, Component] = {}
        self._places: dict[str, int] = {}  # of the signature of the call that runs
        self._refusals: dict[str, LynxError] = {}
        self._processors = {name: _processors(module) for name, module in modules.items()}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The hooks are on the modules meanwhile."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                hook = self._hook(name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(self._result_hook(name)).remove)
                stack.enter_context(self._named_branches(name, module))
            yield

    def on_step_end(self, pipe: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
        """For the pipeline's ``callback_on_step_end``."""
        self.step += 1
        return {}

    def components(self) -> tuple[Component, ...]:
        """The components to record, after the first run.

        Raises:
            InputError: a named one was not called, there is none, or one that looks like a recorded one was not.
        """
        called = [name for name, calls in self._calls.items() if calls]
        often = [name for name in called if self._calls[name] > 1]
        chosen = [name for name in self._modules if name in self._named] or often or called
        if not chosen or (not self._named and not often and len(called) > 1):
            raise InputError(
                f"No component of the {type(self._pipe).__name__} was called more than once"
                f"{f' ({listed(called)} once)' if called else ''}.",
                "Name those to compile.",
            )
        kinds = {type(self._modules[name]) for name in chosen}
        for name, module in self._modules.items():
            if not self._calls[name] and (name in self._named or type(module) in kinds):
                raise InputError(
                    f"The pipeline never called '{name}' in this run.",
                    "Give it the steps and arguments that reach it, or name the components to compile.",
                )
        for name in chosen:
            if name in self._refusals:
                raise self._refusals[name]
        return tuple(self._found[name] for name in chosen)

    def _hook(self, name: str) -> Callable[..., None]:
        known = parameters(type(self._modules[name]).forward)

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = self._calls[name]
            self._calls[name] += 1
            try:
                self._record(name, module, index, known, args, kwargs)
            except LynxError as error:
                self._refusals.setdefault(name, error)
            if name in self._refusals and (name in self._named or self._calls[name] > 1):
                raise self._refusals[name]

        return before

    def _result_hook(self, name: str) -> Callable[..., None]:
        def after(module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if name not in self._found or name in self._refusals:
                return
            if isinstance(result, tuple):
                self._found[name] = replace(self._found[name], returns=len(result))
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.sample.note_results(self._places[name], tuple(tuple(tensor.shape) for tensor in tensors))

        return after

    def _record(
        self,
        name: str,
        module: torch.nn.Module,
        index: int,
        known: Sequence[Parameter],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        arguments = self._flattened(name, bind(known, args, kwargs))
        self._check_state(name, module)
        found = Component(name, class_name(module), config(module), tuple(known))
        if self._found.setdefault(name, found).config != found.config:
            raise InputError(
                f"The pipeline changes the configuration of '{name}' between calls.",
                "One graph cannot follow that; such a pipeline cannot be compiled.",
            )
        step, branch = self._place(name, arguments)
        place = self._places[name] = self.sample.count(name, arguments)
        group = schema_key(self.sample.signature(place))
        keeps, dropped = self._choice.take(name, index, first=group not in self._schemas)
        self._schemas.add(group)
        for other in dropped:
            self.sample.drop(name, other)
        if keeps:
            self.sample.keep(Call(name, 0, index, step, branch, place, {}), arguments)
        if self._last and all(self._calls[other] > last for other, last in self._last.items()):
            self._interrupt()

    def _interrupt(self) -> None:
        """Let the pipeline's loop run idle from its next step on, as diffusers' own callbacks do where it can."""
        if isinstance(getattr(type(self._pipe), "interrupt", None), property):
            self._pipe._interrupt = True

    def _flattened(self, name: str, bound: Mapping[str, Any]) -> Arguments:
        try:
            arguments = flatten(bound)
        except InputError as error:
            switch = next(
                (p for p in call_parameters(self._pipe) if "cache" in p and p.startswith("use_")), None
            )
            way_out = (
                f"Set '{switch}: false' under 'call:'."
                if "a cache" in error.cause and switch
                else error.remedy
            )
            raise InputError(
                f"The pipeline cannot be compiled. Of '{name}', {error.cause}", way_out
            ) from None
        for leaf, tensor in arguments.tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise InputError(
                    f"The pipeline gives '{name}' a {type(tensor).__name__} as '{leaf}'.",
                    "Only torch tensors do.",
                )
        return arguments

    def _check_state(self, name: str, module: torch.nn.Module) -> None:
        """Refuse what would make a replay another computation."""
        if torch.is_grad_enabled():
            problem = "with gradients"
        elif any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
            problem = "under autocast"
        elif module.training:
            problem = "in training mode"
        elif _processors(module) != self._processors[name]:
            raise InputError(
                f"While it runs, the {type(self._pipe).__name__} puts other attention processors into '{name}'"
                " (as perturbed-attention guidance does), so that what it calls is not the model that would be"
                " compiled.",
                "Turn that off (pag_scale: 0), or use the pipeline without it.",
            )
        else:
            return
        raise InputError(
            f"The pipeline runs '{name}' {problem}.", "Inference is what can be compiled: use .eval()."
        )

    def _place(self, name: str, arguments: Arguments) -> tuple[int, str]:
        """Step and branch of the call that comes now."""
        context = self._contexts.get(name)
        branches = self._branches.setdefault(name, [])
        if self._is_new_step(name, arguments, context):
            branches.clear()
        branch = context if context is not None else str(len(branches))
        if branch in branches:  # several calls under one name
            branch = f"{branch} {len(branches)}"
        branches.append(branch)
        return self._steps[name], branch

    def _is_new_step(self, name: str, arguments: Arguments, context: str | None) -> bool:
        """The pipeline says so where it can; otherwise a new step is a new time."""
        before = self._steps.get(name)
        if self.counts_steps:
            self._steps[name] = self.step
            return before != self.step
        leaf = next((leaf for leaf in arguments.tensors if leaf.partition(".")[0] in TIMES), None)
        time = arguments.tensors[leaf].detach().to("cpu", copy=True).flatten()[:1] if leaf else None
        is_new = before is None or time is None or not torch.equal(time, self._times[name])
        if time is not None:
            self._times[name] = time
        self._steps[name] = 0 if before is None else before + is_new
        return is_new

    @contextmanager
    def _named_branches(self, name: str, module: Any) -> Iterator[None]:
        """Note the name that the pipeline gives a branch for the caches of diffusers."""
        if not hasattr(module, "cache_context"):
            yield
            return
        original = module.cache_context

        @contextmanager
        def noted(branch: str, **more: Any) -> Iterator[None]:
            self._contexts[name] = branch
            with original(branch, **more):
                try:
                    yield
                finally:
                    self._contexts.pop(name, None)

        module.cache_context = noted
        try:
            yield
        finally:
            del module.cache_context


class _Choice:
    """Which calls to keep: those of the smallest random numbers, which depend on nothing but seed and place."""

    def __init__(self, most: int | None, seed: str) -> None:
        self._most = most
        self._seed = seed
        self._kept: dict[str, list[tuple[float, int]]] = {}

    def last(self, component: str, calls: int) -> int:
        """The last index to keep, of so many calls."""
        ranked = sorted(range(calls), key=lambda index: self._number(component, index))
        return max(ranked[: self._most], default=0)

    def take(self, component: str, index: int, first: bool) -> tuple[bool, list[int]]:
        """Whether to keep this call, and which earlier ones to drop for it. ``first`` of a graph: always kept."""
        if self._most is None:
            return True, []
        kept = self._kept.setdefault(component, [])
        number = -1.0 if first else self._number(component, index)
        kept.append((number, index))
        kept.sort()
        over = [pair for pair in kept[self._most :] if pair[0] >= 0]
        for pair in over:
            kept.remove(pair)
        dropped = [other for _, other in over]
        return index not in dropped, [other for other in dropped if other != index]

    def _number(self, component: str, index: int) -> float:
        return random.Random(f"{self._seed} {component} {index}").random()


def call_parameters(pipe: Pipeline) -> list[str]:
    """Names of the arguments that a pipeline takes."""
    if isinstance(pipe, ModularPipeline):  # its call takes anything
        return [entry.name for entry in pipe.blocks.inputs if entry.name is not None]  # type: ignore[attr-defined]
    found = inspect.signature(type(pipe).__call__).parameters.values()
    return [p.name for p in found if p.name != "self" and p.kind != p.VAR_KEYWORD]


def class_name(thing: Any) -> str:
    """``module:Class`` of an object."""
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def config(module: Any) -> dict[str, Any]:
    """The module's configuration as JSON holds it, without what belongs to this machine."""
    if not hasattr(module, "to_json_string"):
        return {}
    values: dict[str, Any] = json.loads(module.to_json_string())
    return {
        name: value for name, value in values.items() if not name.startswith("_") or name == "_class_name"
    }


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(names) or "none"


def _processors(module: torch.nn.Module) -> dict[str, Any]:
    return {path: m.processor for path, m in module.named_modules() if hasattr(m, "processor")}
