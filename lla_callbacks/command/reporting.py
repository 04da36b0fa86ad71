"""``python -m lla_callbacks report LOGDIR``: the page of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lla_callbacks.command.errors import DONE, CommandError
from lla_callbacks.page.page import write_page
from lla_callbacks.page.runs import NoRunError, run_in

WORDS = """\
Makes one HTML file of a run, which needs neither a server nor a network: curves with error
bands, spectra with a slider over the steps of training, surfaces of the loss that can be turned.
It reads the .npz files that monitors write beside the logs, and TensorBoard's events or
metrics.csv for your own curves.
"""


def write_report(arguments: Sequence[str]) -> int:
    """Write the page that is asked for, and return the exit code.

    Raises:
        CommandError: If there is no run, or the page cannot be written.
    """
    made = argparse.ArgumentParser(
        prog="python -m lla_callbacks report",
        description=WORDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("logdir", metavar="LOGDIR", help="log folder of a run, or one above it")
    made.add_argument("--out", metavar="FILE", help="the page (LOGDIR/report.html)")
    made.add_argument("--title", metavar="TEXT", default="", help="above it (the folder's name)")
    given = made.parse_args(list(arguments))
    try:
        run, others = run_in(Path(given.logdir).expanduser())
        target = Path(given.out).expanduser() if given.out else run / "report.html"
        page = write_page(run, target, title=given.title)
    except NoRunError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the page cannot be written: {error}") from error
    if others:
        print(f"{run} is the newest of {len(others) + 1} runs in {given.logdir}.")
    print(page)
    return DONE
