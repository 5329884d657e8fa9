# SPDX-License-Identifier: Apache-2.0
"""What pipelines ask of a transformer beside running it, answered by its class without its weights.

Some read sizes that the class keeps as attributes (``inner_dim``, ``in_channels``), count its blocks, or call a
part that has no weights (LTX-2's ``rope``). Whatever would change or run the model is not there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from lynx_compile.engine.calls import import_class
from lynx_compile.errors import first_line

PLAIN = (str, int, float, bool, type(None))


class Blocks:
    """The blocks of a transformer, which only the engine has: they can be counted."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


class ModelClass:
    """The class of the transformer that was compiled. ``no_weights``: in it, torch's modules take no memory."""

    def __init__(
        self, qualified: str, config: Mapping[str, Any], no_weights: AbstractContextManager[Any]
    ) -> None:
        self._qualified = qualified
        self._config = config
        self._no_weights = no_weights
        self._model: Any = None

    def attribute(self, name: str) -> Any:
        """An attribute of the transformer that needs no weights.

        Raises:
            AttributeError: it has none of that name, or one that only the torch model can have.
        """
        kind: Any = import_class(self._qualified)
        # What __init__ sets is among the names of its code: others are asked for too, and need no model to be made.
        if kind is None or name not in inspect.unwrap(kind.__init__).__code__.co_names:
            raise AttributeError(_missing(name))
        value = getattr(self._made(kind, name), name)
        if isinstance(value, PLAIN) or (
            isinstance(value, tuple) and all(isinstance(v, PLAIN) for v in value)
        ):
            return value
        if hasattr(value, "parameters"):
            if not any(True for _ in (*value.parameters(), *value.buffers())):
                return value
            if hasattr(value, "__len__"):
                return Blocks(len(value))
        raise AttributeError(_missing(name))

    def _made(self, kind: Any, name: str) -> Any:
        if self._model is None:
            try:
                with self._no_weights:
                    self._model = kind.from_config(dict(self._config))
            except Exception as error:  # each class has its own
                raise AttributeError(
                    f"{_missing(name)} Its class cannot be made ({first_line(error):.200})."
                ) from None
        return self._model


def _missing(name: str) -> str:
    return (
        f"A compiled transformer has no '{name}'. Adapters, caches, attention processors and the like belong to "
        "the torch model: set them before it is compiled."
    )
