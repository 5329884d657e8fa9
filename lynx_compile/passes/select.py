# SPDX-License-Identifier: Apache-2.0
"""What every linear can become: which operand is 2:4, if one is, and in 16 bits or FP8.

The recipe decides, else a budget (``passes.budget``), to which this leaves what is faster than anything that errs less
as a rule; or speed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from lynx_compile.errors import InputError
from lynx_compile.models.structure import Linear, LinearGroup
from lynx_compile.ops.sparse_weight_linear import STEP
from lynx_compile.passes.speed_table import (
    DENSE,
    DENSE_FP8,
    ROOFLINE,
    UNKNOWN_SPEED,
    CostTable,
    Form,
    roofline,
)
from lynx_compile.recipe import NodeOperand, Sparsity

FP8_GPUS = ("sm89", "sm90", "sm120")  # that run our FP8 kernels
MEASURED_FP8_GPUS = ("sm90",)  # for which auto takes them unasked: elsewhere no one has timed them
# Gains that differ by less are alike: so much do runs of the bench differ for the same linear. Then the form with the
# lower error counts (quality.digits_flux.*.layer_error, solved, of engines/bench/summary.json).
ALIKE = 1.05
BY_ERROR = (
    DENSE_FP8,
    Form("weight"),
    Form("weight", fp8=True),
    Form("activation"),
    Form("activation", fp8=True),
)
FP8_CHANNELS = 32768  # kMaxFp8Channels of plugins/kernels/fp8_linear.h


@dataclass(frozen=True)
class Decision:
    """What happens to one linear: the operand that becomes 2:4, or ``none``, whether it multiplies in FP8, and why."""

    linear: Linear
    operand: NodeOperand
    reason: str
    fp8: bool = False

    @property
    def form(self) -> Form:
        return Form(self.operand, self.fp8)


@dataclass(frozen=True)
class SparseGroup(LinearGroup):
    """Linears that read the same tensor and have one form: one node of the rewritten graph.

    ``operand``: which one is 2:4; ``none``, with ``fp8`` alone, where neither is.
    ``gain``: how many times as fast as dense it was measured to be; None where the recipe's costs do not tell.
    ``fp8``: whether it multiplies in FP8.
    """

    operand: NodeOperand
    gain: float | None = None
    fp8: bool = False

    @property
    def form(self) -> Form:
        return Form(self.operand, self.fp8)

    @property
    def weights(self) -> int:
        """How many its linears have, biases apart."""
        return sum(linear.in_channels * linear.out_channels for linear in self.linears)


@dataclass(frozen=True)
class SparsityPlan:
    """A decision for every linear of the model, and those that change by the tensor they read and their form."""

    decisions: tuple[Decision, ...]
    groups: tuple[SparseGroup, ...]


@dataclass(frozen=True)
class Option:
    """A form that a node may take: how many times as fast as dense, and by what. ``reason``: that in words."""

    form: Form
    gain: float
    measured: bool
    reason: str


@dataclass(frozen=True)
class Open:
    """Linears of a group whose form the recipe leaves open; they take one together.

    ``options``: dense first, then each faster than the one before, and as a rule with a larger error. ``beaten``: those
    that are no faster than one of them which errs less as a rule.
    """

    group: LinearGroup
    linears: tuple[Linear, ...]
    options: tuple[Option, ...]
    beaten: tuple[Option, ...] = ()

    def microseconds(self, option: Option) -> float:
        """Of these linears on an H100 as the roofline has it, shortened by the option's gain."""
        return sum(map(self.dense_microseconds, self.linears)) / option.gain

    def dense_microseconds(self, linear: Linear) -> float:
        """Of one of them, dense, on an H100 as the roofline has it."""
        return _microseconds(self.group, linear)


@dataclass(frozen=True)
class Candidates:
    """What the recipe, shapes and speed leave of every linear's forms.

    ``fixed``: by group, the decisions that are made. ``open``: by the groups' names, those that are not.
    ``nodes``: every node that a plan could have, whatever is decided.
    """

    groups: tuple[LinearGroup, ...]
    fixed: tuple[tuple[Decision, ...], ...]
    open: Mapping[str, Open]
    nodes: tuple[SparseGroup, ...]
    choice: _Choice

    def plan(self, taken: Mapping[str, Decision]) -> SparsityPlan:
        """The plan in which open linears, by their paths, are what ``taken`` says.

        Raises:
            InputError: no linear would change.
        """
        decisions, changed = [], []
        for group, fixed in zip(self.groups, self.fixed, strict=True):
            made = {decision.linear: decision for decision in fixed}
            made |= {linear: taken[linear.path] for linear in group.linears if linear not in made}
            ordered = [made[linear] for linear in group.linears]
            decisions += ordered
            changed += self.choice.split(group, ordered)
        if not changed:
            first = next((d for d in decisions if d.linear.refusal is None), decisions[0])
            raise InputError(
                f"No linear would become {'FP8' if self.choice.sparsity.precision == 'fp8' else 'sparse'} "
                f"('{first.linear.path}': {first.reason}).",
                "Widen sparsity.include, sparsity.operand or the budget, or exclude less.",
            )
        return SparsityPlan(tuple(decisions), tuple(changed))

    def everything(self) -> SparsityPlan:
        """All ``nodes``, for the passes that measure and solve them."""
        return SparsityPlan((), self.nodes)

    def fastest(self) -> SparsityPlan:
        """The plan in which every open linear has its fastest form."""
        return self.plan(
            {d.linear.path: d for open_ in self.open.values() for d in decided(open_, open_.options[-1])}
        )

    def microseconds(self) -> tuple[float, float]:
        """Of the blocks' linears together: all dense, and with what is fixed, the open ones dense."""
        dense = left = 0.0
        for group, fixed in zip(self.groups, self.fixed, strict=True):
            nodes = self.choice.split(group, list(fixed))
            gains = {
                linear: node.gain or self.choice.gain(node, node.form)[0]
                for node in nodes
                for linear in node.linears
            }
            for linear in group.linears:
                if linear.refusal is None:
                    time = _microseconds(group, linear)
                    dense, left = dense + time, left + time / gains.get(linear, 1.0)
        return dense, left


def select(groups: tuple[LinearGroup, ...], sparsity: Sparsity, gpus: tuple[str, ...] = ()) -> SparsityPlan:
    """Decide for every linear, where the recipe leaves it open by speed alone; see ``candidates``.

    Raises:
        InputError: as ``candidates``, or no linear is left.
    """
    return candidates(groups, sparsity, gpus, by_speed=True).plan({})


def candidates(
    groups: tuple[LinearGroup, ...],
    sparsity: Sparsity,
    gpus: tuple[str, ...] = (),
    *,
    by_speed: bool = False,
) -> Candidates:
    """What is left to decide of every linear; a group keeps those of its linears that change, split by form.

    Args:
        gpus: architectures that the engine is for, such as ``sm90``. FP8 is for those whose kernels have it. Where it
            is one alone whose speed is not known, only measured linears change, and those that a glob of
            ``sparsity.operand`` names.
        by_speed: nothing is: the fastest form is taken.

    Raises:
        InputError: the GPUs do not run FP8, a glob matches no linear, or the recipe's costs cannot be read.
    """
    require_fp8(sparsity, gpus)
    _refuse_idle_globs([linear for group in groups for linear in group.linears], sparsity)
    choice = _Choice.of(sparsity, gpus, by_speed)
    fixed, left, nodes = [], {}, []
    for group in groups:
        made, open_ = choice.decide(group)
        fixed.append(tuple(made))
        nodes += choice.split(group, made)
        if open_ is not None:
            left[group.name] = open_
            for option in open_.options:
                joined = {d.linear: d for d in made} | {d.linear: d for d in decided(open_, option)}
                nodes += choice.split(group, [joined[linear] for linear in group.linears])
    return Candidates(tuple(groups), tuple(fixed), left, tuple(dict.fromkeys(nodes)), choice)


def decided(open_: Open, option: Option, reason: str | None = None) -> list[Decision]:
    """The open linears with one of their options."""
    form = option.form
    return [Decision(linear, form.operand, reason or option.reason, form.fp8) for linear in open_.linears]


def require_fp8(sparsity: Sparsity, gpus: tuple[str, ...]) -> None:
    """Refuse ``precision: fp8`` for GPUs without our FP8 kernels; known before anything runs."""
    without = [gpu for gpu in gpus if gpu not in FP8_GPUS]
    if sparsity.precision == "fp8" and without:
        raise InputError(
            f"sparsity.precision is fp8, and this engine is for {', '.join(without)}: "
            f"our FP8 kernels run on {', '.join(FP8_GPUS)} alone.",
            "Set precision to auto, or compile with TensorRT on such a GPU.",
        )


def _refuse_idle_globs(linears: list[Linear], sparsity: Sparsity) -> None:
    for key, globs in (
        ("include", sparsity.include),
        ("exclude", sparsity.exclude),
        ("operand", sparsity.operand_globs),
    ):
        for glob in globs:
            if not any(fnmatchcase(linear.path, glob) for linear in linears):
                example = next(
                    (linear.path for linear in linears if linear.refusal is None), "blocks.0.attn.to_q"
                )
                raise InputError(
                    f"sparsity.{key}: '{glob}' matches no linear of this model.",
                    f"Globs are matched against module paths such as '{example}'.",
                )


@dataclass(frozen=True)
class _Choice:
    """What decisions go by. ``precisions``: of linears, 16 bits or FP8. ``unknown``: a GPU of unknown speed.

    ``by_speed``: whether it decides on all that the recipe leaves open, and no budget.
    """

    sparsity: Sparsity
    costs: CostTable | None
    precisions: tuple[bool, ...]
    unknown: str | None
    by_speed: bool

    @classmethod
    def of(cls, sparsity: Sparsity, gpus: tuple[str, ...], by_speed: bool) -> _Choice:
        costs = CostTable.load(Path(sparsity.costs)) if sparsity.costs else None
        alone = gpus[0] if len(gpus) == 1 else None
        own = costs is not None and alone is not None and costs.architecture == alone
        timed = FP8_GPUS if own else MEASURED_FP8_GPUS
        fp8_pays = bool(gpus) and all(gpu in timed for gpu in gpus)
        return cls(
            sparsity,
            costs,
            sparsity.precisions(fp8_pays),
            alone if alone in UNKNOWN_SPEED and not own else None,
            by_speed,
        )

    def decide(self, group: LinearGroup) -> tuple[list[Decision], Open | None]:
        """The recipe decides first; speed or a budget for the linears that it leaves open, together."""
        made: dict[Linear, Decision] = {}
        left: dict[str, list[Linear]] = {}  # by the glob that names their operand; "" where none does
        for linear in group.linears:
            said = self._by_recipe(linear)
            if isinstance(said, Decision):
                made[linear] = said
            else:
                left.setdefault(said, []).append(linear)
        open_ = None
        for glob in sorted(left, key=bool, reverse=True):  # those without a glob may join the others' nodes
            if not glob and (open_ := self._open(group, left[glob], made)) is not None:
                continue
            made |= {decision.linear: decision for decision in self._by_speed(group, glob, left[glob], made)}
        return [made[linear] for linear in group.linears if linear in made], open_

    def _open(self, group: LinearGroup, linears: list[Linear], made: dict[Linear, Decision]) -> Open | None:
        """What a budget decides on; None where the recipe names the operand, or nothing is faster than dense."""
        if self.by_speed or self.unknown or len(self.sparsity.operands) == 1:
            return None
        options = {option.form: option for option in self._options(group, self._forms(""), linears, made)}
        kept = [Option(DENSE, 1.0, measured=False, reason="dense")]
        for form in BY_ERROR:
            least = kept[-1].gain * (ALIKE if len(kept) > 1 else 1.0)
            if form in options and options[form].gain > least:
                kept.append(options[form])
        beaten = tuple(option for option in options.values() if option not in kept)
        return Open(group, tuple(linears), tuple(kept), beaten) if len(kept) > 1 else None

    def _by_recipe(self, linear: Linear) -> Decision | str:
        """What the recipe says, or the linear's own shape; else the glob that leaves it to speed, "" for none."""
        if linear.refusal is not None:
            return Decision(linear, "none", linear.refusal)
        for glob in self.sparsity.exclude:
            if fnmatchcase(linear.path, glob):
                return Decision(linear, "none", f"excluded by the recipe ('{glob}')")
        if not any(fnmatchcase(linear.path, glob) for glob in self.sparsity.include):
            return Decision(linear, "none", "not included by the recipe")
        matching = (item for item in self.sparsity.operand_globs.items() if fnmatchcase(linear.path, item[0]))
        glob, operand = next(matching, ("", "auto"))
        glob = "" if operand == "auto" else glob
        forms = self._forms(glob)
        changed = [form for form in forms if form != DENSE]
        refusals = [_refusal(form, linear.in_channels) for form in changed]
        if changed and all(refusals):
            return Decision(linear, "none", str(refusals[0]))
        if glob and len(forms) == 1:
            return Decision(linear, forms[0].operand, f"{_said(forms[0])} ('{glob}')", forms[0].fp8)
        return glob

    def _forms(self, glob: str) -> list[Form]:
        """What linears that ``glob`` names may be, or those that none does."""
        operands: tuple[NodeOperand, ...] = self.sparsity.operands
        if glob:
            operand = self.sparsity.operand_globs[glob]
            operands = (operand,) if operand != "auto" else operands
        elif len(operands) > 1:
            operands = (*operands, "none")
        return [Form(operand, fp8) for operand in operands for fp8 in self.precisions]

    def _by_speed(
        self, group: LinearGroup, glob: str, linears: list[Linear], made: dict[Linear, Decision]
    ) -> list[Decision]:
        """The fastest form of ``linears``, of some alike the most accurate; dense where that is slower and left open.

        Counted is the whole node: with the linears for which that form is already ``made``. An operand without an
        alternative gives way to what was measured alone, not to the roofline.
        """
        if self.unknown and not glob:
            reason = f"its speed on {self.unknown} is unknown: give sparsity.costs, by 'lynx-compile bench' on that GPU"
            return [Decision(linear, "none", reason) for linear in linears]
        forms = self._forms(glob)
        options = self._options(group, forms, linears, made)
        if not options:
            reason = f"operand none by the recipe, and FP8 is for {', '.join(FP8_GPUS)}"
            return [Decision(linear, "none", reason) for linear in linears]
        fastest = max(option.gain for option in options)
        alike = [option for option in options if option.gain * ALIKE > fastest]
        best = min(alike, key=lambda option: BY_ERROR.index(option.form))
        open_to_dense = DENSE in forms or (
            not glob and (best.measured or len({f.operand for f in forms}) > 1)
        )
        if best.gain < 1 and open_to_dense:
            return [Decision(linear, "none", f"would be {best.reason}") for linear in linears]
        reason = _said(best.form) if len(forms) == 1 and not best.measured else best.reason
        return [Decision(linear, best.form.operand, reason, best.form.fp8) for linear in linears]

    def _options(
        self, group: LinearGroup, forms: list[Form], linears: list[Linear], made: dict[Linear, Decision]
    ) -> list[Option]:
        """What competes: of a precision in which some were measured, those alone."""
        options = []
        for form in forms:
            if form != DENSE and _refusal(form, group.in_channels) is None:
                joined = [linear for linear, decision in made.items() if decision.form == form]
                options.append(self._option(group, form, [*linears, *joined]))
        measured = {option.form.fp8 for option in options if option.measured}
        return [option for option in options if option.measured or option.form.fp8 not in measured]

    def _option(self, group: LinearGroup, form: Form, node: list[Linear]) -> Option:
        gain, source = self.gain(replace(group, linears=tuple(node)), form)
        out_channels = sum(linear.out_channels for linear in node)
        shape = f"{group.tokens} x {group.in_channels} -> {out_channels}"
        measured = source != ROOFLINE
        return Option(form, gain, measured, f"{gain:.2f}x as fast as dense ({shape}, {source})")

    def gain(self, node: LinearGroup, form: Form) -> tuple[float, str]:
        """How many times as fast as dense a node of these linears is, and by what."""
        sizes = (node.tokens, node.in_channels, sum(linear.out_channels for linear in node.linears))
        rank = self._rank(node, form)
        gain = self.costs.gain(*sizes, form, rank) if self.costs else None
        if self.costs is not None and gain is not None:
            return gain, self.costs.name
        return roofline(*sizes, rank).gain(form), ROOFLINE

    def _rank(self, group: LinearGroup, form: Form) -> int:
        return self.sparsity.rank_for(group.in_channels) if form == Form("activation") else 0

    def split(self, group: LinearGroup, decisions: list[Decision]) -> list[SparseGroup]:
        """The group's linears by their form."""
        parts = []
        for form in sorted(
            {decision.form for decision in decisions} - {DENSE}, key=lambda f: (f.operand, f.fp8)
        ):
            linears = tuple(decision.linear for decision in decisions if decision.form == form)
            out_channels = sum(linear.out_channels for linear in linears)
            sizes = (group.tokens, group.in_channels, out_channels)
            gain = self.costs.gain(*sizes, form, self._rank(group, form)) if self.costs else None
            parts.append(
                SparseGroup(
                    group.name, linears, group.tokens, form.operand, gain, form.fp8, calls=group.calls
                )
            )
        return parts


def _microseconds(group: LinearGroup, linear: Linear) -> float:
    """Of a dense linear, in all its calls, by the roofline: sums of times want a common measure."""
    tokens = sum(group.calls) or group.tokens
    return roofline(tokens, linear.in_channels, linear.out_channels, 0).dense


def _said(form: Form) -> str:
    return f"{form.words if form.fp8 else f'operand {form.operand}'} by the recipe"


def _refusal(form: Form, channels: int) -> str | None:
    """Why the form's kernels do not take K ``channels``; what no kernel takes is the linear's own refusal."""
    if form.fp8 and channels > FP8_CHANNELS:
        return f"K = {channels} is more than the {FP8_CHANNELS} that FP8 kernels take"
    if form == Form("weight") and channels % STEP:
        return f"K = {channels} is not divisible by {STEP}, as the weight operand needs it"
    return None
