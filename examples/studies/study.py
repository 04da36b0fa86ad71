"""What the studies share: settings, rows as JSON, tables, and verdicts by one rule.

The rule was written down before any study ran (thresholds in each study's own text):

* *confirmed*: the 95 % interval of the effect, counted positive in the claimed direction, is
  clear of zero, and so is the effect of at least four fifths of the seeds;
* *refuted*: the interval is clear of zero in the other direction, or lies as a whole within
  the smallest effect of interest;
* *not decided*: otherwise. Fewer than three seeds never decide.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lla_callbacks.minima.statistics import mean_interval

sys.path.insert(0, str(Path(__file__).parents[1]))

LEAST_SEEDS = 3
RULE = (
    "Rule: *confirmed* where the 95 % interval of the effect (positive: as claimed) is clear of 0 "
    "and at least 4 of 5 seeds agree; *refuted* where it is clear of 0 the other way or lies "
    "within the smallest effect of interest; else *not decided*. Fewer than 3 seeds never decide."
)


class Study:
    """One study: its settings, its rows, its claims, its files.

    Args:
        name: Of the study and its files.
        about: Its docstring.
        seeds: Number of seeds, full and quick.
    """

    def __init__(self, name: str, about: str, seeds: tuple[int, int]) -> None:
        parser = argparse.ArgumentParser(description=about.splitlines()[0])
        parser.add_argument("--quick", action="store_true", help="two minutes or less")
        parser.add_argument("--seeds", type=int, help="another number of seeds")
        parser.add_argument("--out", type=Path, default=Path("studies"), help="folder for files")
        parser.add_argument("--data", type=Path, help="folder with data that cannot be shipped")
        given = parser.parse_args()
        self.name, self.quick, self.data = name, given.quick, given.data
        self.seeds = range(given.seeds or seeds[given.quick])
        self._other_seeds = given.seeds is not None
        self.folder: Path = given.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.claims: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._began = time.process_time()
        self._quiet()

    def _quiet(self) -> None:
        # The same sums in the same order, whatever the machine.
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        for logger in ("pytorch_lightning", "lightning.pytorch"):
            logging.getLogger(logger).setLevel(logging.ERROR)

    @property
    def command(self) -> str:
        """What reproduces the study."""
        options = (" --quick" if self.quick else "") + (" --data FOLDER" if self.data else "")
        options += f" --seeds {len(self.seeds)}" if self._other_seeds else ""
        return f"python examples/studies/{self.name}.py{options}"

    def row(self, **values: Any) -> dict[str, Any]:
        """Keep one row and print it."""
        self.rows.append(values)
        print("  " + "  ".join(f"{k} {cell(v)}" for k, v in values.items()), flush=True)
        return values

    def column(self, name: str, **where: Any) -> list[float]:
        """Return one number of the rows that have these values, in their order."""
        return [r[name] for r in self.rows if all(r.get(k) == v for k, v in where.items())]

    def paired(self, name: str, one: dict, other: dict, log: bool = False) -> list[float]:
        """Return, seed by seed, the difference of two kinds of rows, or of their logarithms."""
        a = {r["seed"]: r[name] for r in self.rows if all(r.get(k) == v for k, v in one.items())}
        b = {r["seed"]: r[name] for r in self.rows if all(r.get(k) == v for k, v in other.items())}
        pairs = [(a[s], b[s]) for s in self.seeds if s in a and s in b]
        if log:
            return [math.log(x / y) for x, y in pairs if x > 0 and y > 0]
        return [x - y for x, y in pairs]

    def claim(
        self,
        key: str,
        text: str,
        source: str,
        measured: str,
        effects: Sequence[float],
        *,
        smallest: float = 0.0,
        ratio: bool = False,
    ) -> None:
        """Judge a claim by the effects of each seed, positive as claimed.

        Args:
            key: Short name.
            text: The claim.
            source: Who makes it.
            measured: What the effect is.
            effects: One a seed.
            smallest: Smallest effect of interest.
            ratio: Whether effects are logarithms of ratios, which are shown.
        """
        known = [e for e in effects if math.isfinite(e)]
        mean, low, high = mean_interval(known) if known else (math.nan,) * 3
        agree = sum(e > 0 for e in known)
        verdict = judged(len(known), low, high, agree, smallest)
        shown = [math.exp(v) if ratio else v for v in (mean, low, high)]
        said = (
            f"{cell(shown[0])} [{cell(shown[1])}, {cell(shown[2])}]; {agree} of {len(known)} agree"
        )
        self._add(key, text, source, measured, len(known), said, verdict)

    def claim_interval(
        self,
        key: str,
        text: str,
        source: str,
        measured: str,
        count: int,
        value: float,
        low: float,
        high: float,
        *,
        confirmed: bool,
        refuted: bool,
    ) -> None:
        """Add a claim that is judged by an interval of its own, by a rule in the study's text."""
        verdict = "confirmed" if confirmed else "refuted" if refuted else "not decided"
        said = f"{cell(value)} [{cell(low)}, {cell(high)}]"
        self._add(key, text, source, measured, count, said, verdict)

    def _add(
        self, key: str, text: str, source: str, measured: str, n: int, said: str, verdict: str
    ) -> None:
        self.claims.append(
            {"key": key, "claim": text, "source": source, "measured": measured, "n": n,
             "found": said, "verdict": verdict}
        )  # fmt: skip
        print(f"{key}: {text}: {said}: {verdict}", flush=True)

    def finish(self, columns: Sequence[str], figures: dict[str, Figure]) -> None:
        """Write rows, table and figures."""
        stem = self.folder / self.name
        plain = {"command": self.command, "rows": self.rows, "claims": self.claims}
        stem.with_suffix(".json").write_text(json.dumps(_finite(plain), indent=1) + "\n")
        lines = [f"# {self.name}{', quick' if self.quick else ''}", "", f"`{self.command}`", ""]
        lines += ["| claim | source | measured | n | found, 95 % interval | verdict |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for c in self.claims:
            lines.append(
                f"| {c['key']}: {c['claim']} | {c['source']} | {c['measured']} | {c['n']} | "
                f"{c['found']} | **{c['verdict']}** |"
            )
        lines += ["", RULE, "", *self.notes, "", f"| {' | '.join(columns)} |"]
        lines.append("|---" * len(columns) + "|")
        for r in self.rows:
            lines.append("| " + " | ".join(cell(r.get(c, "")) for c in columns) + " |")
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
        for suffix, figure in figures.items():
            figure.savefig(self.folder / f"{self.name}{suffix}.png")
        spent = time.process_time() - self._began
        print(f"Written to {stem}.md, .json and .png in {spent:.0f} seconds of one core.")


def judged(count: int, low: float, high: float, agree: int, smallest: float) -> str:
    """Return the verdict of the rule above."""
    if count < LEAST_SEEDS or not math.isfinite(low):
        return "not decided"
    if low > 0 and agree >= 0.8 * count:
        return "confirmed"
    if high < 0 or (-smallest <= low and high <= smallest):
        return "refuted"
    return "not decided"


def cell(value: Any) -> str:
    """Return a number with three digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _finite(value: Any) -> Any:
    """Return the same without numbers that JSON has not, and with six digits."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
