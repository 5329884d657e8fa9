# SPDX-License-Identifier: Apache-2.0
"""Attention over no keys at all is zero, as in torch: ONNX has no form of the empty products.

sdpa(q [.., queries, K], k [.., 0, K], v [.., 0, V])  ->  zeros [.., queries, V]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.functional import scaled_dot_product_attention

from lynx_compile.models.trace.rule import Rule


class NoKeys(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (given[name] for name in ("query", "key", "value"))
            keys = key.shape[-2]
            if isinstance(keys, int) and keys == 0:
                return query.new_zeros(*query.shape[:-1], value.shape[-1])
        return function(*args, **kwargs)
