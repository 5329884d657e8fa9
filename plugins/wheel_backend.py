# SPDX-License-Identifier: Apache-2.0
"""pip's build backend: scikit-build-core, whose wheels then get auditwheel's tag.

scikit-build-core tags a wheel for the Linux that built it; auditwheel reads from the libraries' symbols which Linux
runs it (manylinux_2_34 where they were linked with glibc 2.34 or later).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scikit_build_core import build
from scikit_build_core.build import (  # the other hooks are its own
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel into a folder; returns its file's name."""
    with TemporaryDirectory(dir=wheel_directory) as folder:  # moved, not copied
        built = Path(folder, build.build_wheel(folder, config_settings, metadata_directory))
        # TensorRT for RTX comes with the extra; nothing is patched, so that no patchelf is needed.
        options = [
            "--exclude",
            "libtensorrt_rtx.so.1",
            "--patcher",
            "none",
            "--wheel-dir",
            f"{folder}/tagged",
        ]
        subprocess.run([sys.executable, "-m", "auditwheel", "repair", *options, str(built)], check=True)
        (tagged,) = Path(folder, "tagged").iterdir()
        return tagged.replace(Path(wheel_directory, tagged.name)).name
