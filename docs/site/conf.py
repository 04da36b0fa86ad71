"""Build the site from docs/ with Sphinx and MyST: `make docs`. Nothing is fetched."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

project = "lla_callbacks"
author = "the authors of lla_callbacks"
version = release = version_of("lla_callbacks")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["site"]
html_theme = "furo"
html_title = f"lla_callbacks {version}"

myst_heading_anchors = 3
# A name between single backticks is code, as in Markdown.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# What Lightning says of its hooks is in Lightning's own pages.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Pages that lie elsewhere in the repository, where people and packagers look for them.
ELSEWHERE = {"start": "README.md", "changes": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
PAGE_OF = {file: f"{page}.md" for page, file in ELSEWHERE.items()}


def _take_from_elsewhere(app: Any, page: str, source: list[str]) -> None:
    """Put the file in the place of the page that stands for it, its links seen from docs/."""
    if page.startswith("studies/"):
        # In no list of pages: the page of claims leads to each.
        source[0] = f"---\norphan: true\n---\n\n{source[0]}"
    if page not in ELSEWHERE:
        return
    text = (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")

    def seen_from_here(link: re.Match[str]) -> str:
        target, place = link[1], link[2] or ""
        return f"]({PAGE_OF.get(target, target.removeprefix('docs/'))}{place})"

    source[0] = re.sub(r"\]\(([^)#:]+)(#[^)]*)?\)", seen_from_here, text)


def setup(app: Any) -> None:
    app.connect("source-read", _take_from_elsewhere)
