# SPDX-License-Identifier: Apache-2.0
"""Attention over no keys at all is zero, as in torch: ONNX has no form of the empty products.

sdpa(q [.., queries, K], k [.., 0, K], v [.., 0, V])  ->  zeros [.., queries, V]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class NoKeys(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (given[name] for name in ("query", "key", "value"))
            keys = key.shape[-2]
            if isinstance(keys, int) and keys == 0:
                return query.new_zeros(*query.shape[:-1], value.shape[-1])
        return function(*args, **kwargs)
