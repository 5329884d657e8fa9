# SPDX-License-Identifier: Apache-2.0
"""Offline compiler from diffusion transformers to TensorRT engines with 2:4 sparse linear layers."""

__version__ = "0.1.0"
