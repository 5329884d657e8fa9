# SPDX-License-Identifier: Apache-2.0
"""The last pass: what was built, as the manifest that goes beside the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lynx_compile import __version__
from lynx_compile.engine import trt
from lynx_compile.engine.arguments import dtype_of, flatten
from lynx_compile.engine.manifest import (
    FORMAT_VERSION,
    AtOutput,
    AtSteps,
    BackendVersion,
    Budget,
    Call,
    CandidateForm,
    DenseLinear,
    EngineFile,
    HalfOfSteps,
    LinearChoice,
    Manifest,
    Plugin,
    Source,
    SparseLinears,
    Stage,
    Weights,
)
from lynx_compile.files.digest import Written
from lynx_compile.models.calls import recorded_call
from lynx_compile.passes.build import BuiltEngine
from lynx_compile.passes.export import DenseOnnx
from lynx_compile.passes.rewrite import LynxOnnx, SparseNode

if TYPE_CHECKING:
    from lynx_compile.files.resume import Cost
    from lynx_compile.models.dit import DiT
    from lynx_compile.models.structure import Linear
    from lynx_compile.passes.budget import Selection
    from lynx_compile.passes.select import Decision, Open
    from lynx_compile.passes.verify import Verified
    from lynx_compile.recipe import Recipe


def describe(
    recipe: Recipe,
    dit: DiT,
    dense: DenseOnnx,
    lynx: LynxOnnx,
    built: BuiltEngine,
    written: Mapping[str, Written],
    costs: Mapping[str, Cost] | None = None,
    selection: Selection | None = None,
    verified: Verified | None = None,
) -> Manifest:
    """The manifest of an engine that ``build`` has made.

    Args:
        written: the files of ``lynx`` and ``built`` by their names, as they were written.
        costs: of the stages, in their order.
        selection, verified: what a budget decided, and what was measured of it.
    """
    names = {tensor.name for tensor in built.inputs}
    assert names.issuperset(lynx.external_inputs), "build checks it"
    return Manifest(
        format_version=FORMAT_VERSION,
        compiler=__version__,
        engine=EngineFile(file=built.path.name, bytes=built.bytes, sha256=built.sha256),
        backend=BackendVersion.model_validate({"name": built.backend, "version": built.backend_version}),
        gpus=built.gpus,
        plugin=Plugin(
            names=tuple(lynx.plugins),
            version=trt.PLUGIN_VERSION,
            namespace=trt.PLUGIN_NAMESPACE,
            library=built.plugin.name,
            sha256=built.plugin_sha256,
            embedded=built.plugin_embedded,
        ),
        plugin_layers=built.plugin_layers,
        dtype=recipe.model.dtype,
        inputs=tuple(tensor for tensor in built.inputs if tensor.name not in lynx.external_inputs),
        outputs=built.outputs,
        lengths=lynx.lengths,
        weights=_weights(lynx, built, written),
        recipe_sha256=recipe.digest,
        source=Source(
            model=getattr(recipe.model, "source", str(dit.checkpoint.folder)),
            subfolder=dit.component,
            revision=getattr(recipe.model, "revision", None),
            family=dit.checkpoint.class_name,
            config=dict(dit.checkpoint.config),
            sha256=dit.digest,
            loras=getattr(dit.checkpoint, "loras", ()),
        ),
        call=call_of(dit, dense) if dense.output else None,
        costs=Path(recipe.sparsity.costs).name if recipe.sparsity.costs else None,
        sparse=tuple(_sparse(node) for node in lynx.sparse),
        dense=tuple(DenseLinear(linear=linear.path, reason=linear.reason) for linear in lynx.dense),
        files=tuple(
            EngineFile(file=name, bytes=file.bytes, sha256=file.sha256)
            for name, file in written.items()
            if name not in (built.path.name, built.plugin.name)
        ),
        stages=tuple(Stage(name=name, **asdict(cost)) for name, cost in (costs or {}).items()),
        budget=_budget(selection, verified) if selection is not None and verified is not None else None,
    )


def _budget(selection: Selection, verified: Verified) -> Budget:
    key, value = selection.limit
    plan = selection.plan(verified.taken)
    whole = asdict(verified.whole)
    chosen = {decision.linear.path: decision for decision in plan.decisions}
    return Budget(
        limit=key,
        value=value,
        speed=selection.speed(verified.taken),
        error=AtOutput(**{name: whole[name] for name in AtOutput.model_fields}),
        psnr=verified.psnr,
        calls=verified.calls,
        steps=tuple(AtSteps(**asdict(steps)) for steps in verified.steps),
        halves=tuple(
            HalfOfSteps(first=steps.start, last=steps.stop - 1, speed=speed)
            for steps, speed in selection.halves(verified.taken)
        ),
        stepped_back=tuple(
            linear.path
            for name in verified.stepped_back
            for linear in selection.candidates.open[name].linears
        ),
        linears=tuple(
            _choice(selection, open_, linear, chosen[linear.path])
            for open_ in selection.candidates.open.values()
            for linear in open_.linears
        ),
    )


def _choice(selection: Selection, open_: Open, linear: Linear, decision: Decision) -> LinearChoice:
    options = sorted((*open_.options, *open_.beaten), key=lambda option: option.gain)
    return LinearChoice(
        linear=linear.path,
        candidates=tuple(
            CandidateForm(
                operand=option.form.operand,
                fp8=option.form.fp8,
                gain=option.gain,
                measured=option.measured,
                error=selection.alone(linear.path, option.form),
            )
            for option in options
        ),
        chosen=[option.form for option in options].index(decision.form),
        reason=decision.reason,
        microseconds=open_.dense_microseconds(linear),
    )


def call_of(dit: DiT, dense: DenseOnnx) -> Call:
    """How torch calls the transformer: as it was recorded, in the dtypes that the engine takes."""
    assert dense.output is not None, "an export of a module has it"
    call = recorded_call(dit.recorded, dit.calls, dit.arguments, dense.output, dense.baked)
    dtypes = {name: dtype_of(tensor) for name, tensor in flatten(dit.arguments).tensors.items()}
    return call.model_copy(update={"tensors": dtypes})


def _weights(lynx: LynxOnnx, built: BuiltEngine, written: Mapping[str, Written]) -> Weights:
    if not lynx.external_inputs:
        return Weights(mode="embedded", file=None, sha256=None, tensors=())
    tensors = tuple(tensor for tensor in built.inputs if tensor.name in lynx.external_inputs)
    name = lynx.weights_path.name
    return Weights(mode="external", file=name, sha256=written[name].sha256, tensors=tensors)


def _sparse(node: SparseNode) -> SparseLinears:
    return SparseLinears(
        layer=node.name,
        operand=node.operand,
        fp8=node.fp8,
        producer=node.producer,
        linears=node.linears,
        in_channels=node.in_channels,
        out_channels=node.out_channels,
        rank=node.rank,
        norm_scale=node.norm_scale,
        errors=node.errors,
        tokens=node.tokens,
        gain=node.gain,
        sizes=node.sizes,
        activation_from=node.activation_from if node.activation and not node.gated else None,
        metadata_layout=node.metadata_layout,
        gated=(node.gated.x, node.gated.gate, node.gated.channels) if node.gated else None,
        solved_errors=node.solved_errors,
    )
