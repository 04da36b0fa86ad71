"""One HTML file of a run: everything in it, nothing fetched, readable without a server."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from lla_callbacks.page.logged import curves_of, monitored, own_curves
from lla_callbacks.page.runs import NoRunError, run_in
from lla_callbacks.page.slices import slices_of
from lla_callbacks.page.spectra import hessian_of
from lla_callbacks.version import __version__

# In the order in which a browser reads them.
SCRIPTS = ("charts.js", "surface.js", "page.js")


def write_page(folder: str | Path, path: str | Path, *, title: str = "") -> Path:
    """Write the page of a run and return its path.

    Args:
        folder: The run's log folder, or one above it: then the run that was written to last.
        path: Of the page; folders are made.
        title: Above the page; the folder's name otherwise.

    Raises:
        NoRunError: If there is nothing to show.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = page_of(read_run(Path(folder)), title=title)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def read_run(folder: Path) -> dict[str, Any]:
    """Return all that a page holds of a run, as plain values.

    Raises:
        NoRunError: If there is nothing to show.
    """
    run, others = run_in(folder)
    hessians: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []
    broken: list[str] = []
    for part in sorted(p for p in run.iterdir() if p.is_dir()):
        for read, kept in ((hessian_of, hessians), (slices_of, slices)):
            try:
                found = read(part)
            except Exception as error:  # noqa: BLE001 - one broken file must not cost the page
                broken.append(f"{part.name}/ could not be read ({type(error).__name__}: {error})")
                continue
            if found is not None:
                kept.append(found)
                break
    curves, left = curves_of(run)
    names = [h["name"] for h in hessians]
    curved = [c for h in hessians for c in h["curves"]] + monitored(curves, names)
    own = own_curves(curves, {c["tag"].split("/")[0] for c in curved} | {s["name"] for s in slices})
    if not (curved or slices or own):
        raise NoRunError(f"{run} holds no measurement and no curve: there is nothing to show.")
    notes = [*broken, *left]
    if others:
        some = ", ".join(str(o.relative_to(folder)) for o in others[-3:])
        notes.append(f"{len(others)} other runs lie beside this one ({some})")
    return {
        # Whoever gets the page need not know where on a machine it was made.
        "run": "/".join(run.resolve().parts[1:][-3:]),
        "curves": curved,
        "own": own,
        "hessians": [{k: v for k, v in h.items() if k != "curves"} for h in hessians],
        "slices": slices,
        "notes": notes,
    }


def page_of(run: dict[str, Any], *, title: str = "") -> str:
    """Return a run as the text of one HTML file."""
    here = files("lla_callbacks.page")
    parts = {
        "TITLE": html.escape(title or Path(run["run"]).name),
        "RUN": html.escape(run["run"]),
        "STYLE": here.joinpath("page.css").read_text(encoding="utf-8"),
        "FACTS": "\n".join(_facts(h) for h in run["hessians"]),
        "NOTES": _list(run["notes"]),
        "VERSION": html.escape(__version__),
        # No "</script>" of a name of the user's ends the block early.
        "DATA": json.dumps(run, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": "\n".join(here.joinpath(s).read_text(encoding="utf-8") for s in SCRIPTS),
    }
    # In one pass, so that nothing of the user's is taken for a place.
    pieces = here.joinpath("page.html").read_text(encoding="utf-8").split("@@")
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))


def _facts(hessian: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in hessian["facts"]
    )
    name = html.escape(hessian["name"])
    return f"<h3>{name}</h3><table>{rows}</table>{_list(hessian['gaps'])}"


def _list(lines: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
