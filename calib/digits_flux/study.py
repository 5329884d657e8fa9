# SPDX-License-Identifier: Apache-2.0
"""Which operand, which compensation? Every candidate linear of digits-flux sparse, one row per method.

``python -m calib.digits_flux.study`` from the repository's root. Every row is an ONNX file in float32, run by ONNX
Runtime inside the sampler, from the same seeds. Writes ``study.json`` and a contact sheet per row into ``study/``.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import typer

from calib.digits_flux import classifier, digits, evaluate, sampler
from lynx_compile.models import prompts
from lynx_compile.models.dit import DiT, find_dit
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import open_model
from lynx_compile.models.recording import Recording
from lynx_compile.models.structure import LinearGroup
from lynx_compile.passes.calibrate import Statistics, calibrate
from lynx_compile.passes.compensate import compensate, load_weights
from lynx_compile.passes.export import DenseOnnx, export
from lynx_compile.passes.record import record
from lynx_compile.passes.rewrite import rewrite
from lynx_compile.passes.select import SparsityPlan, select
from lynx_compile.recipe import Recipe, Sparsity, load_recipe
from lynx_compile.solve import masks, weight_refit
from lynx_compile.solve.moments import LayerStatistics, dense_squares, relative_error

RECIPE = digits.HERE.parents[1] / "engines" / "digits-flux.yaml"
FOLDER = digits.HERE / "study"
SEED = 1  # not the seed of evaluate.py, and no noise that calibration saw
BATCH = 50
SHEET_COLUMNS = 10
SHEET_IMAGES = 40

ACTIVATIONS = {
    "activations 2:4, naive": Sparsity(method="none", norm_scale=False),
    "+ norm scale": Sparsity(method="none", norm_scale=True),
    "+ norm scale + low rank (the paper)": Sparsity(method="paper"),
    "activations 2:4, refit alone": Sparsity(method="joint", rank=0),
    "activations 2:4, joint refit + low rank": Sparsity(method="joint"),
}
WEIGHTS = ("weights 2:4, magnitude", "weights 2:4, Wanda", "weights 2:4, Wanda mask + least-squares refit")
ROWS = ("dense", *WEIGHTS, *ACTIVATIONS)


@dataclass(frozen=True)
class Row:
    """One method's figures.

    ``accuracy``: share of samples that the classifier reads as their label. ``frechet``: distance to the dense
    model's samples in the classifier's features. ``output_error``: |v - v_dense| / |v_dense| over all states of
    the dense model's own trajectories. ``layer_error``: mean over the sparse inputs, on calibration tokens.
    """

    method: str
    accuracy: float
    frechet: float
    output_error: float
    layer_error: float | None
    sheet: str


@dataclass(frozen=True)
class Setup:
    recipe: Recipe
    dit: DiT
    recording: Recording
    plan: SparsityPlan
    folder: Path
    threads: int

    def statistics(self, norm_scale: bool) -> Statistics:
        """The calibration's moments; measured when first asked for."""
        folder = self.folder / f"statistics-{norm_scale}"
        if folder.exists():
            return Statistics(folder, tuple(group.name for group in self.plan.groups))
        recipe = self.recipe.model_copy(
            update={"sparsity": Sparsity(operand="activation", norm_scale=norm_scale)}
        )
        return calibrate(self.dit, self.plan, self.recording, recipe, folder, _counter("calibrate"))


def main(
    samples: int = 500,
    steps: int = 20,
    only: list[str] | None = None,
    threads: int = 2,
    folder: Path = FOLDER,
) -> None:
    """Measure all rows and print the table; with --only just those that contain one of its texts.

    Rows measured with --only take their place in the study.json that is there.
    """
    methods = [row for row in ROWS if not only or row == "dense" or any(part in row for part in only)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(set_up(Path(scratch), threads), methods, samples, steps, folder)
    facts = {"samples": samples, "steps": steps, "seed": SEED, "machine": machine()}
    path = folder / "study.json"
    old = json.loads(path.read_text()) if only and path.exists() else facts | {"minutes": 0, "rows": []}
    if any(old[key] != value for key, value in facts.items()):
        sys.exit(f"error: {path} was measured differently. Run without --only.")
    found = {row["method"]: row for row in (*old["rows"], *(asdict(row) for row in rows))}
    facts["minutes"] = round(old["minutes"] + (time.monotonic() - start) / 60, 1)
    facts["rows"] = [found[method] for method in ROWS if method in found]
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts))


def table(facts: Mapping) -> str:  # type: ignore[type-arg]
    """The study as a Markdown table."""
    lines = [
        "| all block linears sparse | accuracy | Fréchet distance to dense | output error | mean layer error |",
        "|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        layer = "" if row["layer_error"] is None else f"{row['layer_error']:.3f}"
        lines.append(
            f"| {row['method']} | {row['accuracy']:.1%} | {row['frechet']:.3f} | {row['output_error']:.3f} | {layer} |"
        )
    return "\n".join(lines)


def set_up(scratch: Path, threads: int = 2) -> Setup:
    """The demo's recipe at the study's batch, and its model."""
    recipe = load_recipe(RECIPE)
    calibration = recipe.calibration.model_copy(update={"batch": BATCH})
    recipe = recipe.model_copy(update={"calibration": calibration})
    opened = open_model(recipe, scratch / "converted")
    rows = prompts.read(Path(calibration.prompts or ""))
    recording = record(recipe, opened, rows, scratch / "recording", _counter("record"))
    (calls,) = recording.ways()
    dit = find_dit(opened.checkpoints[calls.component], recording, calls, DTYPES[recipe.model.dtype])
    return Setup(recipe, dit, recording, select(dit.groups, Sparsity(operand="activation")), scratch, threads)


def measure(setup: Setup, methods: Sequence[str], samples: int, steps: int, folder: Path) -> list[Row]:
    """Rows for ``methods``; the first must be ``dense``, to which the others are compared."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(digits.CLASSES).repeat(-(-samples // digits.CLASSES))[:samples]
    dense_onnx = export(setup.dit, setup.folder / "dense" / "dense.onnx", torch.float32)
    states: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    reference = torch.empty(0)
    rows = []
    for method in methods:
        path, layer_error = build(setup, method, dense_onnx)
        transformer = runner(path, setup.threads)
        error = output_error(transformer, states) if states else 0.0
        recording = transformer if states else _recorder(transformer, states)
        images = sampler.sample(recording, labels, SEED, steps, batch=BATCH)
        features = classifier.features(images)
        reference = reference if len(reference) else features
        sheet = folder / f"{_slug(method)}.png"
        sampler.contact_sheet(images[:SHEET_IMAGES], SHEET_COLUMNS, sheet)
        rows.append(
            Row(
                method=method,
                accuracy=(classifier.predict(images) == labels).float().mean().item(),
                frechet=max(evaluate.frechet_distance(features, reference), 0.0),
                output_error=error,
                layer_error=layer_error,
                sheet=sheet.name,
            )
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def build(setup: Setup, method: str, dense: DenseOnnx) -> tuple[Path, float | None]:
    """The ONNX file of one row, and its mean layer error."""
    if method == "dense":
        return dense.path, None
    if method in ACTIVATIONS:
        sparsity, folder = ACTIVATIONS[method], setup.folder / _slug(method)
        statistics = setup.statistics(sparsity.uses_norm_scale)
        weights = compensate(setup.dit, setup.plan, statistics, sparsity, folder, _counter(method))
        errors = [error for path in weights for error in load_weights(path).errors]
        return rewrite(dense, setup.plan, weights, folder / "lynx.onnx").path, float(np.mean(errors))
    setup.statistics(norm_scale=False)  # of the dense weights
    with _sparse_weights(setup, method) as errors:
        path = export(setup.dit, setup.folder / _slug(method) / "dense.onnx", torch.float32).path
    return path, float(np.mean(errors))


@contextmanager
def _sparse_weights(setup: Setup, method: str) -> Iterator[list[float]]:
    """The module with 2:4 weights in every linear of the plan, put back afterwards; yields the linears' errors."""
    state = {name: value.clone() for name, value in setup.dit.module.state_dict().items()}
    try:
        yield [
            error
            for group in setup.plan.groups
            for error in _sparsify(
                setup.dit.module, group, setup.statistics(norm_scale=False).load(group.name), method
            )
        ]
    finally:
        setup.dit.module.load_state_dict(state)


def _sparsify(
    module: torch.nn.Module, group: LinearGroup, moments: LayerStatistics, method: str
) -> list[float]:
    """Prune a group's weights in place; each linear's relative error on the calibration tokens."""
    errors = []
    for path in (linear.path for linear in group.linears):
        linear = module.get_submodule(path)
        weight = linear.weight.detach().clone()
        by_magnitude = method.endswith("magnitude")
        keep = masks.magnitude_mask(weight) if by_magnitude else masks.wanda_mask(weight, moments)
        sparse, offset = weight * keep, torch.zeros_like(linear.bias)
        if method.endswith("refit"):
            sparse, offset = weight_refit.refit(weight, keep, moments, Sparsity().ridge)
        dense = dense_squares(weight, linear.bias, moments).sum()
        linear.weight.copy_(sparse)
        linear.bias.add_(offset)
        lost = weight - sparse
        squared = ((lost @ moments.xx) * lost).sum() + (lost @ moments.x_mean - offset).square().sum()
        errors.append(relative_error(float(squared), float(dense)))
    return errors


def runner(path: Path, threads: int = 2) -> Callable[..., torch.Tensor]:
    """An ONNX file as the callable that the sampler wants."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}

    def velocity(**inputs: torch.Tensor) -> torch.Tensor:
        feed = {name: value.float().contiguous().numpy() for name, value in inputs.items() if name in names}
        return torch.from_numpy(session.run(None, feed)[0])

    return velocity


def output_error(
    transformer: Callable[..., torch.Tensor], states: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]]
) -> float:
    """Relative error of the velocity over recorded states."""
    wrong = total = 0.0
    for inputs, expected in states:
        wrong += float((transformer(**inputs) - expected).square().sum())
        total += float(expected.square().sum())
    return (wrong / total) ** 0.5


def _recorder(
    transformer: Callable[..., torch.Tensor], states: list[tuple[dict[str, torch.Tensor], torch.Tensor]]
) -> Callable[..., torch.Tensor]:
    """``transformer``, noting inputs and output of the first two batches (all steps)."""
    first: list[torch.Tensor] = []

    def velocity(**inputs: torch.Tensor) -> torch.Tensor:
        result = transformer(**inputs)
        if not first or inputs["timestep"][0] == first[0]:
            first.append(inputs["timestep"][0].clone())  # a new batch begins
        if len(first) <= 2:
            states.append(({name: value.clone() for name, value in inputs.items()}, result.clone()))
        return result

    return velocity


def machine() -> str:
    """Processor and cores, as the table's caption names them."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return (
        f"{names[0] if names else platform.processor()}, {len(names)} cores, ONNX Runtime {ort.__version__}"
    )


def _counter(what: str) -> Callable[[str, int, int], None]:
    def show(step: str, done: int, total: int) -> None:
        if done == total:
            print(f"{what}: {step} {done}/{total}", file=sys.stderr, flush=True)

    return show


def _slug(method: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in method.replace("2:4", "24")).lower().split())


if __name__ == "__main__":
    typer.run(main)
