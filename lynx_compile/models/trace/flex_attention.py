# SPDX-License-Identifier: Apache-2.0
"""``flex_attention`` under a block mask as attention under a dense one: ONNX has no attention that runs code.

create_block_mask(mask_mod, ...)  ->  mask_mod of all positions at once, [batch, heads, queries, keys]
flex_attention(q, k, v, mask)     ->  scaled_dot_product_attention(q, k, v, attn_mask=dense)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.attention.flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

from lynx_compile.errors import StageError


class _DenseMask(flex.BlockMask):
    """To Python a block mask like any other."""

    def __init__(self, dense: torch.Tensor, block_size: tuple[int, int]) -> None:
        self.dense = dense
        self.BLOCK_SIZE = block_size


@contextmanager
def dense_flex_attention() -> Iterator[None]:
    """While this is open, both functions are replaced, wherever they have been imported to."""
    replaced = {flex.create_block_mask: _mask, flex.flex_attention: _attention}
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            for original, ours in replaced.items():
                name = original.__name__
                if getattr(module, "__dict__", {}).get(name) is original:
                    stack.enter_context(patch.object(module, name, ours))
        stack.enter_context(patch.object(flex.BlockMask, "from_kv_blocks", _mask_of_blocks))
        yield


def _mask(
    mask_mod: Callable[..., torch.Tensor],
    B: int | None,  # noqa: N803
    H: int | None,  # noqa: N803
    Q_LEN: int,  # noqa: N803
    KV_LEN: int,  # noqa: N803
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,  # noqa: N803
    **_: Any,
) -> _DenseMask:
    positions = []
    for dimension, size in enumerate((B or 1, H or 1, Q_LEN, KV_LEN)):
        shape = [1, 1, 1, 1]
        shape[dimension] = size
        positions.append(torch.arange(size, device=device).view(shape))
    dense = mask_mod(*positions).expand(B or 1, H or 1, Q_LEN, KV_LEN)
    return _DenseMask(dense, BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE))


def _mask_of_blocks(
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    full_kv_num_blocks: torch.Tensor | None = None,
    full_kv_indices: torch.Tensor | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,  # noqa: N803
    mask_mod: Callable[..., torch.Tensor] | None = None,
    **_: Any,
) -> _DenseMask:
    """Of counts [batch, heads, query blocks] and as many first of the indices [batch, heads, query blocks, key blocks].

    ``mask_mod`` holds inside of the first kind of blocks; the other kind is seen whole.
    """
    sizes = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    seen = _seen(kv_num_blocks, kv_indices, sizes)
    if mask_mod is not None:
        batch, heads, queries, keys = seen.shape
        seen = seen & _mask(mask_mod, batch, heads, queries, keys, seen.device).dense
    if full_kv_num_blocks is not None and full_kv_indices is not None:
        seen = seen | _seen(full_kv_num_blocks, full_kv_indices, sizes)
    return _DenseMask(seen, sizes)


def _seen(counts: torch.Tensor, indices: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """[batch, heads, queries, keys]: the indices are all blocks, in the order in which they are taken."""
    seen = indices.argsort(-1) < counts[..., None]
    return seen.repeat_interleave(sizes[0], 2).repeat_interleave(sizes[1], 3)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    **_: Any,
) -> torch.Tensor:
    if score_mod is not None or return_lse or not isinstance(block_mask, _DenseMask | None):
        raise StageError(
            "export",
            "the model calls flex_attention with a score function, or a mask that it made of blocks.",
            "Choose another attention for the model.",
        )
    mask = None if block_mask is None else block_mask.dense
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
