# SPDX-License-Identifier: Apache-2.0
"""The compiled digits-flux in torch, on a GPU where there is one: every op, the whole model, and what it draws.

``python -m calib.digits_flux.gpu OUT.engine FOLDER`` from the repository's root, for an engine that was compiled from
the demo's model. Writes ``gpu.json`` and ``gpu.png`` into FOLDER: rows of the dense module's images, of the applied
module's, and of the Lynx ONNX file's in ONNX Runtime, all from the same noise. Exit code 1: a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch import nn

import lynx_compile
from calib.digits_flux import classifier, digits, sampler
from lynx_compile.engine.manifest import Manifest
from lynx_compile.files.float32 import float32_copy
from lynx_compile.files.outputs import Outputs
from lynx_compile.torch_ops.apply import DTYPES
from lynx_compile.torch_ops.definitions import COMPILED, definition

IMAGES, STEPS, SEED, BATCH = 40, 20, 1, 10
SHEET_COLUMNS = 20
OP_LIMIT = 2**-7  # y's own rounding, and what the tensor cores' sums turn over
MODEL_LIMIT = 3.0  # times what 16 bits alone do to the dense model
LEAST_ACCURACY = 0.9

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Found:
    """``ops``: {path: error of an op against its definition in float64, over all of the dense run's states' tensors}.

    Errors are |y - y'| / |y'| over the states of the dense module's first batch. ``applied``: the applied module to
    the Lynx ONNX in float32; ``rounding``: the dense module in 16 bits to itself in float32; ``compiled``: the applied
    module to the dense one in float32. ``accuracy``: share of each model's images that are read as their label.
    """

    device: str
    dtype: str
    ops: dict[str, float]
    applied: float
    rounding: float
    compiled: float
    accuracy: dict[str, float]

    def missed(self) -> list[str]:
        """The limits that are not kept, one sentence each."""
        found = [
            f"{path} is off its definition by {error:.2e}"
            for path, error in self.ops.items()
            if not error < OP_LIMIT
        ]
        if not self.applied < MODEL_LIMIT * self.rounding:
            found.append(
                f"the model is off its ONNX by {self.applied:.2e}, the dense one by {self.rounding:.2e}"
            )
        accuracies = [
            f"{name}: {share:.1%} are read" for name, share in self.accuracy.items() if share < LEAST_ACCURACY
        ]
        return found + accuracies


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="calib.digits_flux.gpu", description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"in whole batches of {BATCH}")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    found = measure(given.engine, given.folder / "gpu.png", given.images, given.steps)
    (given.folder / "gpu.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    worst = max(found.ops, key=lambda path: found.ops[path])
    print(f"{given.engine.name} on {found.device}, {found.dtype}")
    print(f"{len(found.ops)} ops against float64: worst {found.ops[worst]:.2e} ({worst})")
    print(
        f"output: {found.applied:.2e} off the Lynx ONNX in float32, {found.compiled:.2e} off the dense model; "
        f"16 bits alone move the dense one by {found.rounding:.2e}"
    )
    for name, share in found.accuracy.items():
        print(f"classifier accuracy, {name}: {share:.1%} of {given.images}")
    for sentence in found.missed():
        print(f"missed: {sentence}")
    return int(bool(found.missed()))


def measure(engine: Path, sheet: Path, images: int, steps: int) -> Found:
    """Everything about one engine; writes the sheet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outputs = Outputs.find(engine)
    dtype = DTYPES[Manifest.read(outputs.manifest).dtype]
    labels = torch.arange(digits.CLASSES).repeat(-(-images // digits.CLASSES))[:images]

    def drawn(transformer: sampler.Velocity) -> torch.Tensor:
        return sampler.sample(transformer, labels, SEED, steps, batch=BATCH)

    module = sampler.load_model(dtype).to(device)
    states: list[Inputs] = []
    dense_images = drawn(_noting(on_device(module), states))
    states = [_rounded(state, dtype) for state in states[:steps]]  # the first batch's
    exact = _outputs(sampler.dense(sampler.load_model(dtype).float()), states)
    dense = _outputs(on_device(module), states)
    lynx_compile.apply(module, engine)
    with held_to_definitions(module) as ops:
        applied = _outputs(on_device(module), states)
    applied_images = drawn(on_device(module))
    with tempfile.TemporaryDirectory() as scratch:
        onnx = _session(float32_copy(outputs.onnx, Path(scratch) / "lynx.onnx"))
        wanted, onnx_images = _outputs(onnx, states), drawn(onnx)
    kinds = {"dense": dense_images, "applied": applied_images, "ONNX Runtime": onnx_images}
    sampler.contact_sheet(torch.cat(list(kinds.values())), min(SHEET_COLUMNS, images), sheet)
    return Found(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        dtype=str(dtype).removeprefix("torch."),
        ops=ops,
        applied=_off(applied, wanted),
        rounding=_off(dense, exact),
        compiled=_off(applied, exact),
        accuracy={name: _accuracy(found, labels) for name, found in kinds.items()},
    )


def on_device(module: nn.Module) -> sampler.Velocity:
    """The module, wherever it is, as ``sampler.sample`` calls it."""
    velocity, device = sampler.dense(module), next(module.parameters()).device

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        return velocity(**{name: value.to(device) for name, value in inputs.items()}).cpu()

    return run


@contextmanager
def held_to_definitions(module: nn.Module) -> Iterator[dict[str, float]]:
    """Every op that runs meanwhile against its definition on the same input; the errors are there at the end."""
    lost: dict[str, float] = defaultdict(float)
    total: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = {}

    def hook(path: str) -> Callable[..., None]:
        def compare(op: nn.Module, given: tuple[torch.Tensor], y: torch.Tensor) -> None:
            expected = definition(op, given[0])
            lost[path] += float((y.double() - expected).square().sum())
            total[path] += float(expected.square().sum())

        return compare

    ops = {path: op for path, op in module.named_modules() if isinstance(op, COMPILED)}
    handles = [op.register_forward_hook(hook(path)) for path, op in ops.items()]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()
    if silent := set(ops) - set(total):
        raise RuntimeError(f"{sorted(silent)[0]} did not run")
    errors |= {path: (lost[path] / total[path]) ** 0.5 for path in ops}


def _session(path: Path) -> sampler.Velocity:
    """An ONNX file in ONNX Runtime, as ``sampler.sample`` calls it."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}

    def velocity(**inputs: torch.Tensor) -> torch.Tensor:
        feed = {name: value.float().contiguous().numpy() for name, value in inputs.items() if name in names}
        return torch.from_numpy(session.run(None, feed)[0])

    return velocity


def _noting(transformer: sampler.Velocity, states: list[Inputs]) -> sampler.Velocity:
    def run(**inputs: torch.Tensor) -> torch.Tensor:
        states.append({name: value.clone() for name, value in inputs.items()})
        return transformer(**inputs)

    return run


def _rounded(state: Inputs, dtype: torch.dtype) -> Inputs:
    """What the module in 16 bits sees of a state, so that the others see no more."""
    return {
        name: value if name.endswith("_ids") else value.to(dtype).float() for name, value in state.items()
    }


def _outputs(transformer: sampler.Velocity, states: Sequence[Inputs]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([transformer(**state) for state in states])


def _off(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def _accuracy(images: torch.Tensor, labels: torch.Tensor) -> float:
    return (classifier.predict(images) == labels).float().mean().item()


if __name__ == "__main__":
    sys.exit(main())
