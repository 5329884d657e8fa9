# SPDX-License-Identifier: Apache-2.0
"""A query that may see no key at all gets zeros from attention, as in torch; the exported softmax gives it a mean.

    sdpa(q, k, v, mask)  ->  where(any(mask, keys), sdpa(q, k, v, mask), 0)

Only for masks with a dimension of queries: one for keys alone leaves out padding, and some text there always is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lynx_compile.models.trace.rule import Rule


class MaskedRows(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        if function is scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None and mask.dtype == torch.bool and mask.dim() > 1 and mask.shape[-2] > 1:
                return torch.where(mask.any(-1, keepdim=True), result, 0.0)
        return result
