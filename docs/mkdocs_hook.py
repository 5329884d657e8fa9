# SPDX-License-Identifier: Apache-2.0
"""mkdocs: the README is the first page, and what pages link to elsewhere in the repository is taken along.

So the same links hold on the site and where the files themselves are read, and ``mkdocs build --strict`` checks them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS, HOME = "docs", "README.md"
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, every file of the repository that a page links to, and what those pages link to."""
    pages = [HOME, *(f"{DOCS}/{file.src_uri}" for file in files.documentation_pages())]
    _add(files, HOME, config)
    for page in pages:  # it grows meanwhile
        for match in LINK.finditer((ROOT / page).read_text()):
            path = _resolved(page, match["target"])
            if (ROOT / path).is_file() and files.get_file_from_path(_site(path)) is None:
                _add(files, path, config)
                pages += [path] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links between files of the repository become links between files of the site."""
    here = page.file.src_uri
    origin = HOME if here == "index.md" else next(p for p in (f"{DOCS}/{here}", here) if (ROOT / p).is_file())

    def link(match: re.Match[str]) -> str:
        path = _resolved(origin, match["target"])
        if not (ROOT / path).is_file():
            return match[0]  # mkdocs says that it is not there
        return os.path.relpath(_site(path), PurePosixPath(here).parent) + (match["anchor"] or "")

    return LINK.sub(link, markdown)


def _add(files: Files, path: str, config: MkDocsConfig) -> None:
    files.append(File.generated(config, _site(path), abs_src_path=str(ROOT / path)))


def _resolved(origin: str, target: str) -> str:
    """The path in the repository that ``target`` names in the file ``origin``."""
    return os.path.normpath(PurePosixPath(origin).parent / target)


def _site(path: str) -> str:
    """Where a file of the repository is among the site's sources."""
    return "index.md" if path == HOME else path.removeprefix(f"{DOCS}/")
