# SPDX-License-Identifier: Apache-2.0
"""What ``compare`` needs of a compilation beyond the manifest: the recipe and the dense ONNX, in its cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lynx_compile.errors import InputError, first_line
from lynx_compile.files.atomic import save_text
from lynx_compile.files.outputs import Outputs
from lynx_compile.recipe import Recipe

FILE = "compiled.json"


@dataclass(frozen=True)
class Compiled:
    """``export_key``: of the stage that wrote the dense ONNX; ``engine_sha256``: of the engine made from it."""

    recipe: Recipe
    export_key: str
    engine_sha256: str

    def write(self, outputs: Outputs) -> None:
        """Keep it in the cache."""
        values: dict[str, Any] = TypeAdapter(Compiled).dump_python(self, mode="json")
        save_text(outputs.cache / FILE, json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, outputs: Outputs, engine_sha256: str) -> Compiled:
        """What the engine was made from.

        Raises:
            InputError: the cache is gone, or belongs to another run than the engine.
        """
        path = outputs.cache / FILE
        again = "Compile the engine again; stages that have not changed are not run."
        try:
            found = TypeAdapter(cls).validate_json(path.read_bytes())
            stamp = json.loads((outputs.cache / "export.stamp.json").read_text(encoding="utf-8"))
        except OSError as error:
            elsewhere = f"Give its cache with --cache if it lies elsewhere. {again}"
            raise InputError(f"{error.filename} cannot be read ({error.strerror}).", elsewhere) from None
        except (ValueError, ValidationError) as error:
            raise InputError(
                f"{path} does not tell how the engine was compiled ({first_line(error)}).", again
            ) from None
        if found.engine_sha256 != engine_sha256 or stamp.get("key") != found.export_key:
            raise InputError(f"{path.parent} belongs to another run than {outputs.engine}.", again)
        return found
