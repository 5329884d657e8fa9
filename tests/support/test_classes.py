# SPDX-License-Identifier: Apache-2.0
"""The classes that differ most, through the whole compiler; ``make support`` does so with all of them.

Those that take minutes, for what others show too, by ``make nightly``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.check import check

# Of every candidate: one whose result nothing reads, in the last block of some, is not in the graph.
UNREAD = {"QwenImageTransformer2DModel": 3}
# Texts of any length, no mask, and a module that decides on the length: an engine for one, which refuses others.
ONE_LENGTH = ("ZImageTransformer2DModel",)
AT_NIGHT = (
    "CogView4Transformer2DModel",
    "FluxTransformer2DModel",  # and Kontext; most other tests compile a FLUX
    "HiDreamImageTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "LTX2VideoTransformer3DModel",
    "QwenImageTransformer2DModel",  # and -Edit
    "SanaTransformer2DModel",
    "WanTransformer3DModel",  # two of them in one pipeline; test_two_denoisers.py has it too
    "ZImageTransformer2DModel",
)
CLASSES = ("DiTTransformer2DModel", "Flux2Transformer2DModel", "SD3Transformer2DModel")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*CLASSES, *(pytest.param(name, marks=pytest.mark.nightly) for name in AT_NIGHT)]
)
def test_class(name: str, tmp_path: Path) -> None:
    row = check(name, tmp_path, {"captured", "exported", "rewritten", "engine", "dropin"})
    assert row.captured and row.exported and row.equal and row.engine, row.reason
    if name in ONE_LENGTH:
        assert any("and the engine has fp32 [12, 32]" in reason for reason in row.reason)
    else:
        assert row.dropin, row.reason
    assert row.candidates and row.rewritten == row.candidates - UNREAD.get(name, 0), row.reason
    assert row.masks_live is not False, row.reason
