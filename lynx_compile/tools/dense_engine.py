# SPDX-License-Identifier: Apache-2.0
"""The dense model as an engine of the same kind, to compare the Lynx engine with on a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lynx_compile.engine.arrays import DTYPES
from lynx_compile.engine.manifest import EngineFile, Manifest, Weights
from lynx_compile.files.outputs import Outputs
from lynx_compile.passes.build import build
from lynx_compile.passes.rewrite import LynxOnnx
from lynx_compile.recipe import Recipe


def build_dense_engine(recipe: Recipe, dense: Path, manifest: Manifest, path: Path) -> Path:
    """Build ``path`` from the ``dense`` ONNX, with a manifest beside it as the Lynx engine has."""
    engine = recipe.engine.model_copy(update={"backend": manifest.backend.name})
    built = build(LynxOnnx(dense, dense, (), (), ()), engine, path)
    update = {
        "engine": EngineFile(file=path.name, bytes=built.bytes, sha256=built.sha256),
        "plugin": manifest.plugin.model_copy(update={"library": built.plugin.name}),
        "plugin_layers": built.plugin_layers,
        "inputs": built.inputs,
        "outputs": built.outputs,
        "weights": Weights(mode="embedded", file=None, sha256=None, tensors=()),
        "sparse": (),
    }
    manifest.model_copy(update=update).write(Outputs.of(path).manifest)
    return path


def run_engine(
    path: Path, feeds: Sequence[dict[str, np.ndarray]]
) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """Run an engine on every feed: the outputs as float32, and the seconds that each took, copies included."""
    from lynx_compile.engine.runtime import Engine  # needs CUDA

    results, times = [], []
    with Engine.open(path) as engine:
        dtypes = {tensor.name: DTYPES[tensor.dtype].numpy for tensor in engine.inputs}
        for feed in feeds:
            given = {name: feed[name].astype(dtype) for name, dtype in dtypes.items()}
            start = time.perf_counter()
            outputs = engine.run(given)
            times.append(time.perf_counter() - start)
            results.append({name: np.asarray(value).astype(np.float32) for name, value in outputs.items()})
    return results, times
