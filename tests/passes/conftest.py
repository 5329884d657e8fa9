# SPDX-License-Identifier: Apache-2.0
"""The small ONNX graphs of the engine's tests."""

from tests.engine.conftest import lynx, script, write_onnx

__all__ = ["lynx", "script", "write_onnx"]
