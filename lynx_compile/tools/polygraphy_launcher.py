# SPDX-License-Identifier: Apache-2.0
"""``lynx-polygraphy``: polygraphy with our plugin in TensorRT's registry (also as ``python -m`` of this module).

``polygraphy convert --plugins`` only opens the library and registers no plugin: TensorRT then takes the model-local
function of the same name, and builds a dense engine without a word. Here the library is loaded as TensorRT wants it,
every Lynx node has to ask for its plugin, and after ``convert`` the engine is searched for as many plugin layers as the
ONNX has Lynx nodes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

from lynx_compile.engine import trt
from lynx_compile.engine.plan import MAGIC, read_plan
from lynx_compile.errors import InputError, LynxError, StageError
from lynx_compile.files.atomic import atomic_path

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # read when polygraphy is first imported


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; takes polygraphy's arguments and exits with its code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    sys.argv[0] = "lynx-polygraphy"
    try:
        _load_plugin()
        sys.exit(_run(arguments))
    except LynxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _load_plugin() -> None:
    """Into the TensorRT that polygraphy will take. Without one, what needs none still works."""
    switch = os.environ.get(SWITCH)
    choice = "auto" if switch is None else ("tensorrt_rtx" if switch not in ("", "0") else "tensorrt")
    try:
        backend = trt.backend(choice)
    except InputError as error:
        print(f"warning: {error} What needs TensorRT fails.", file=sys.stderr)
        return
    os.environ[SWITCH] = "1" if backend.name == "tensorrt_rtx" else "0"
    trt.load_plugin(backend, trt.plugin_library())


def _run(arguments: list[str]) -> int:
    from polygraphy.tools import main as polygraphy_main

    given = _conversion(arguments)
    if given is None:
        return int(polygraphy_main(arguments) or 0)
    model, output = given
    _check_nodes(model)
    with atomic_path(output) as temporary:
        # With the output's suffix, by which polygraphy knows what to write; the last -o counts.
        made = temporary.with_name(f"{temporary.name}{output.suffix}")
        try:
            if status := int(polygraphy_main([*arguments, "-o", str(made)]) or 0):
                raise SystemExit(status)
            _check_engine(model, made)
            made.replace(temporary)
        finally:
            made.unlink(missing_ok=True)
    return 0


def _conversion(arguments: list[str]) -> tuple[Path, Path] | None:
    """Model and output of ``convert`` where it makes an engine of an ONNX file, read by polygraphy's own parser."""
    if arguments[:1] != ["convert"]:
        return None
    from polygraphy.tools import TOOL_REGISTRY

    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for tool in TOOL_REGISTRY:
        if tool.name == "convert":
            tool.setup_parser(subparsers)
    found, _ = parser.parse_known_args(arguments)
    model, output = Path(found.model_file), Path(found.output)
    to_engine = found.convert_to == "trt" or (not found.convert_to and output.suffix in (".engine", ".plan"))
    from_onnx = found.model_type == "onnx" or (not found.model_type and model.suffix == ".onnx")
    return (model, output) if to_engine and from_onnx else None


def _check_nodes(model: Path) -> None:
    """Every Lynx node must ask for the plugin: else TensorRT builds the function of its name, dense, or dies of it."""
    for node in _lynx_nodes(model):
        attributes = {each.name: each.s.decode() for each in node.attribute}
        asked = attributes.get("plugin_namespace"), attributes.get("plugin_version")
        if asked != (trt.PLUGIN_NAMESPACE, trt.PLUGIN_VERSION):
            raise StageError(
                "convert",
                f"the node '{node.name}' of {model} does not ask for a plugin.",
                "Compile the model again: each node needs plugin_namespace 'lynx' and plugin_version '1'.",
            )


def _lynx_nodes(model: Path) -> list[onnx.NodeProto]:
    """None where the file is no ONNX, which polygraphy says better."""
    try:
        nodes = onnx.load(model, load_external_data=False).graph.node
    except Exception:  # protobuf's DecodeError has no common base with OSError
        return []
    return [node for node in nodes if node.domain == trt.PLUGIN_NAMESPACE]


def _check_engine(model: Path, engine: Path) -> None:
    """Exactly the Lynx nodes must have become plugin layers."""
    due = len(_lynx_nodes(model))
    plan = read_plan(engine)
    if plan.magic != MAGIC or plan.records != due:
        raise StageError(
            "convert",
            f"the engine holds {plan.records} plugin layers, {model} has {due} Lynx nodes.",
            "Compile the model again.",
        )
    print(f"{due} Lynx nodes became {due} plugin layers")


if __name__ == "__main__":
    main()
