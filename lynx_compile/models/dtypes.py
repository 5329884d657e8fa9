# SPDX-License-Identifier: Apache-2.0
"""torch's dtypes by the names that recipes have."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
