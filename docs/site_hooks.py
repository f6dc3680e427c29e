"""Bring the pages that lie beside docs/ into the site, and turn the links between them and docs/.

On disk, and where the repository is hosted, a link is the path from one file to another; the site has the files of
docs/ at its top and the others under `repository/`.
"""

import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

BESIDE = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md", "deploy/RUNBOOK.md")
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages beside docs/."""
    for path in BESIDE:
        files.append(File.generated(config, f"repository/{path}", abs_src_path=posixpath.abspath(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(here)), match[1]))
        return f"]({posixpath.relpath(_in_site(target), posixpath.dirname(here) or '.')}"

    return _LINK.sub(turned, markdown)


def _in_repository(path: str) -> str:
    return path.removeprefix("repository/") if path.startswith("repository/") else f"docs/{path}"


def _in_site(path: str) -> str:
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
