# SPDX-License-Identifier: Apache-2.0
"""The base of everything that is read from a file a user may have written: recipe, manifest, comparison, study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lynx_compile.errors import InputError, first_line
from lynx_compile.files.atomic import save_text


class Strict(BaseModel):
    """Frozen values. Unknown keys, values of another type, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Kept(Strict):
    """A result that is kept as JSON, with its ``format_version``."""

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        save_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read_kept(cls, path: Path, version: int, remedy: str) -> Self | None:
        """What was written; None where there is none, or it is of another ``version``.

        Raises:
            InputError: it cannot be read.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format_version"] != version:
                return None
            return cls.model_validate_json(json.dumps(values))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, ValidationError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({first_line(error)}).", remedy) from None
