# SPDX-License-Identifier: Apache-2.0
"""The base of everything that is read from a file a user may have written: recipe, manifest, comparison."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Frozen values. Unknown keys, values of another type, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
