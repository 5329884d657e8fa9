# SPDX-License-Identifier: Apache-2.0
"""What a product does with its result before it writes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Epilogue:
    """An activation of ``ops.sparse_linear`` from row ``first`` of the weight on; 0 is none.

    ``gated``: from there on rows come in turns of 8, those to activate and those that multiply them; two of them make
    an output channel.
    """

    activation: int = 0
    first: int = 0
    gated: bool = False

    def width(self, rows: int) -> int:
        """Output channels of a weight of so many rows."""
        return self.first + (rows - self.first) // 2 if self.gated else rows

    def gelu_from(self, rows: int) -> int:
        """The first channel with a GELU, for ops that have no other epilogue; ``rows`` for none."""
        assert not self.gated, "it has no gates"
        return self.first if self.activation else rows


NO_EPILOGUE = Epilogue()
