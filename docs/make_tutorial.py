"""Execute examples/tutorial.py cell by cell and write docs/tutorial.md with what came out.

    python docs/make_tutorial.py

Printed lines follow their cell, and a cell that ends in a figure or a result shows its picture.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "examples" / "tutorial.py"


def cells_of(source: str) -> list[tuple[str, str]]:
    """Return the cells of a percent script: pairs of kind and text."""
    found = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip()))
    return found


def executed(code: str, names: dict[str, Any]) -> tuple[str, Any]:
    """Run a cell; return what it printed and what its last line is, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(SOURCE), "exec"), names)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(SOURCE), "eval"), names)
    return printed.getvalue().rstrip(), value


def main() -> None:
    parts: list[str] = []
    names: dict[str, Any] = {"__name__": "tutorial"}
    pictures = 0
    for kind, text in cells_of(SOURCE.read_text()):
        if kind == "markdown":
            parts.append(text)
            continue
        # Fenced as "py": each block of "python" is a test that stands alone.
        parts.append(f"```py\n{text}\n```")
        printed, value = executed(text, names)
        if printed:
            parts.append(f"```text\n{printed}\n```")
        if hasattr(value, "savefig"):
            pictures += 1
            path = ROOT / "docs" / "images" / f"tutorial_{pictures}.png"
            value.savefig(path, dpi=100)
            parts.append(f"![Figure {pictures} of the tutorial](images/{path.name})")
    (ROOT / "docs" / "tutorial.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
