# SPDX-License-Identifier: Apache-2.0
"""What is needed beyond the base install, by the extra of ``pyproject.toml`` that brings it."""

from __future__ import annotations

from importlib.util import find_spec

from lynx_compile.errors import InputError

_TORCH = ("diffusers", "safetensors", "torch")
_COMPILE = (
    *_TORCH,
    "PIL",
    "accelerate",
    "greenlet",
    "huggingface_hub",
    "jinja2",
    "onnx",
    "onnx_graphsurgeon",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "rich",
    "tqdm",
    "typer",
    "yaml",
)
_COMPARE = (*_COMPILE, "polygraphy")
# Modules that are imported. tests/test_package.py reads them from the sources and finds their packages.
MODULES = {
    "torch": _TORCH,
    "compile": _COMPILE,
    "compare": _COMPARE,
    "bench": (*_COMPARE, "matplotlib"),
}


def require(extra: str, what: str) -> None:
    """Whether all that ``what`` imports is installed; nothing is imported for it.

    Raises:
        InputError: it is not; it names the modules, and the extra to install.
    """
    missing = [name for name in MODULES[extra] if find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}.", f"Run: pip install 'lynx_compile[{extra}]'")
