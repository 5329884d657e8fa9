# SPDX-License-Identifier: Apache-2.0
"""``python -m lynx_compile``, as torchrun starts it: the command ``lynx-compile``."""

from lynx_compile.cli import main

if __name__ == "__main__":
    main()
