# SPDX-License-Identifier: Apache-2.0
"""The console scripts, and ``python -m lynx_compile``, as torchrun starts it: is what they import installed?"""

import sys

from lynx_compile.errors import InputError
from lynx_compile.extras import require

EXTRAS = {"compare": "compare", "bench": "bench", "study": "bench"}  # of the other commands: compile


def main() -> None:
    """``lynx-compile``."""
    command = sys.argv[1] if sys.argv[1:] and sys.argv[1] in EXTRAS else None
    _require(
        EXTRAS.get(command or "", "compile"), "lynx-compile" if command is None else f"lynx-compile {command}"
    )
    from lynx_compile.cli import main as run

    run()


def polygraphy() -> None:
    """``lynx-polygraphy``."""
    _require("compare", "lynx-polygraphy")
    from lynx_compile.tools.polygraphy_launcher import main as run

    run()


def _require(extra: str, what: str) -> None:
    try:
        require(extra, what)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
