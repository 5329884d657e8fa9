# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile``: one group of commands, of which the one without a name compiles. They parse and show; no more.

``group`` lists the commands, one file each; ``console`` is where they speak, ``display`` how they show what they do.
"""

from lynx_compile.cli.group import app, main

__all__ = ["app", "main"]
