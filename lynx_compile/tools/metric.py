# SPDX-License-Identifier: Apache-2.0
"""The recipe's own metric: somebody's function of the images of both models."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np

from lynx_compile.errors import InputError


def call_metric(name: str, dense: np.ndarray, lynx: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """The numbers of the metric ``module:function``, looked up as ``python -m`` would: in the working directory too.

    Args:
        dense, lynx: images [n, colours, height, width] float32 in [0, 1], of the same noise.
        prompts: for each, the row of the calibration source that it was drawn for.

    Raises:
        InputError: there is no such function, it fails, or returns no mapping of names to finite numbers.
    """
    module, function = name.split(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        values = getattr(importlib.import_module(module), function)(dense, lynx, prompts)
        numbers = {str(key): float(value) for key, value in values.items()}
    except Exception as error:  # it is somebody's code
        raise InputError(
            f"The metric '{name}' failed ({type(error).__name__}: {error}).",
            "Run where its module can be imported; it takes (dense, lynx, prompts) and returns {name: number}.",
        ) from error
    finally:
        sys.path.pop(0)
    if bad := [key for key, value in numbers.items() if not math.isfinite(value)]:
        raise InputError(f"The metric '{name}' returned no finite '{bad[0]}'.", "Correct it.")
    return numbers
