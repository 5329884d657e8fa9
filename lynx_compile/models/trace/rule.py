# SPDX-License-Identifier: Apache-2.0
"""What the rules that see torch's calls have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class Rule(TorchFunctionMode):
    """While it is entered, every call of torch goes through ``call``; those that ``call`` makes do not."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.call(function, tuple(args), dict(kwargs or {}))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of ``function(*args, **kwargs)``, or of what stands for it; ``kwargs`` may be changed."""
        raise NotImplementedError
