# SPDX-License-Identifier: Apache-2.0
"""What an error in one step shows in the finished image: the weights of steps in tuning and in the choice of linears.

``python -m calib.step_weights RECIPE [--folder build/levers]``. The recipe's pipeline runs with 2:4 weights in one step
and the dense ones in all others, step by step, for prompts that calibration did not see. With e_k the relative error of
the output in step k and d_k that of the finished image, d_k / e_k is what a step's error is worth: were the errors of
steps independent, the image's squared error would be the sum of (d_k / e_k)^2 e_k^2.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from calib.levers import Prepared, prepare
from lynx_compile.models.capture import call_pipeline, sample_seed
from lynx_compile.passes.block_weights import all_linears, substituted
from lynx_compile.solve.stacking import outputs_of
from lynx_compile.solve.tune import TunedLinear
from lynx_compile.tools.held_out import open_sampler


def main(
    recipe: Path,
    folder: Annotated[Path, typer.Option(help="What is made on the way is kept there.")] = Path(
        "build/levers"
    ),
    prompts: int = 8,
) -> None:
    """Print a line for every step."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepared = prepare(recipe, folder)
    linears = all_linears(prepared.files, prepared.solved, prepared.device)
    errors, shown = measure(prepared, linears, prompts)
    worth = [d / e for d, e in zip(shown, errors, strict=True)]
    print("step  output error  image error  image/output  weight (mean 1)")
    mean = sum(w * w for w in worth) / len(worth)
    for step, (e, d, w) in enumerate(zip(errors, shown, worth, strict=True)):
        print(f"{step:>4}  {e:>12.4f}  {d:>11.4f}  {w:>12.3f}  {w * w / mean:>6.2f}")


def measure(
    prepared: Prepared, linears: Mapping[str, TunedLinear], prompts: int
) -> tuple[list[float], list[float]]:
    """Relative errors of the output in each step and of the finished latents, root mean squares over prompts."""
    compare = prepared.recipe.compare.model_copy(update={"samples": prompts})
    recipe = prepared.recipe.model_copy(update={"compare": compare})
    sampler = open_sampler(recipe, prepared.folder / "converted")
    assert sampler is not None, "the recipe has a pipeline"
    module = getattr(sampler.pipe, prepared.dit.component)
    module.to(prepared.device)
    lost, shown = [], []
    for number, row in enumerate(sampler.rows):
        arguments = {**recipe.call, **row}
        seed = sample_seed(recipe.compare.seed, number)
        dense = _final(sampler.pipe, arguments, seed, watch := _Watch(module, linears, None))
        steps = range(watch.step + 1)
        lost.append(watch.errors)
        shown.append(
            [
                _relative(_final(sampler.pipe, arguments, seed, _Watch(module, linears, step)), dense)
                for step in steps
            ]
        )
        logging.info("prompt %d of %d", number + 1, len(sampler.rows))
    return _rms(lost), _rms(shown)


class _Watch:
    """Runs the compressed linears in one step; in none it notes what they would lose, by steps."""

    def __init__(self, module: torch.nn.Module, linears: Mapping[str, TunedLinear], only: int | None) -> None:
        self.module, self.linears, self.only = module, linears, only
        self.step, self.errors = -1, list[float]()
        self._time: Any = None
        self._dense = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        time = next((kwargs[name] for name in ("timestep", "t", "sigma") if name in kwargs), args[:1])
        if self._time is None or str(time) != str(self._time):
            self.step, self._time = self.step + 1, time
        if self.only is not None and self.step != self.only:
            return self._dense(*args, **kwargs)
        with substituted(self.module, self.linears):
            made = self._dense(*args, **kwargs)
        if self.only is not None:
            return made
        dense = self._dense(*args, **kwargs)
        error = _relative(outputs_of(made)[0], outputs_of(dense)[0])
        if len(self.errors) == self.step:
            self.errors.append(error)
        return dense


def _final(pipe: Any, arguments: Mapping[str, Any], seed: int, watch: _Watch) -> torch.Tensor:
    """What the pipeline returns, undecoded."""
    watch.module.forward = watch
    try:
        result = call_pipeline(pipe, arguments | {"output_type": "latent"}, seed)
    finally:
        del watch.module.forward
    return outputs_of(result)[0]


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _rms(rows: list[list[float]]) -> list[float]:
    return [float(v) for v in torch.tensor(rows, dtype=torch.float64).square().mean(0).sqrt()]


if __name__ == "__main__":
    typer.run(main)
