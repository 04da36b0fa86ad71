"""Put the verdicts of all studies into one table of docs/claims.md.

Usage: python examples/studies/claims.py docs/studies docs/claims.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

START, END = "<!-- verdicts -->", "<!-- end of verdicts -->"


def table(folder: Path, page: Path) -> str:
    """Return a Markdown table of every claim in the folder's files."""
    lines = ["| claim | source | measured | n | found, 95 % interval | verdict |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for path in sorted(folder.glob("**/*.json")):
        stored = json.loads(path.read_text())
        link = path.with_suffix(".md").relative_to(page.parent).as_posix()
        lines.append(f"| [`{stored['command']}`]({link}) | | | | | |")
        for c in stored["claims"]:
            lines.append(
                f"| {c['key']}: {c['claim']} | {c['source']} | {c['measured']} | {c['n']} | "
                f"{c['found']} | **{c['verdict']}** |"
            )
    return "\n".join(lines)


def main() -> None:
    folder, page = map(Path, sys.argv[1:])
    text = page.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n\n{table(folder, page)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
