"""``python -m lla_callbacks``: what is asked, in order, and what a shell is told of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lla_callbacks.command.errors import DONE, FAILED, INTERRUPTED, REFUSED, CommandError
from lla_callbacks.command.loading import batches_from, module_from, named
from lla_callbacks.command.measuring import measure_all, plan_of, write_all
from lla_callbacks.command.reporting import write_report
from lla_callbacks.command.request import Request, parser, read_request
from lla_callbacks.linalg.errors import described
from lla_callbacks.page.page import write_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments ask for, and return the exit code.

    Args:
        arguments: Of the command line, without the program's name; ``None``: the process's own.

    Returns:
        0: done. 1: the measurement failed. 2: what was asked cannot be. 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["report"]:
            return write_report(given[1:])
        return _measure(given[1:] if given[:1] == ["measure"] else given)
    except CommandError as error:
        print(f"lla_callbacks: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("lla_callbacks: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _measure(given: list[str]) -> int:
    if not given:
        parser().print_help(sys.stderr)
        return REFUSED
    request = read_request(given)
    plan = plan_of(request)
    loss = None if request.loss is None else named("loss", request.loss)
    module, step = module_from(request)
    batches = batches_from(request, module)
    folder = _folder(request)
    try:
        hessian, landscape = measure_all(request, plan, module, batches, loss)
        lines = write_all(folder, hessian, landscape, step)
        (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _keep(request, folder)
        page = write_page(folder, folder / "report.html", title=request.module.path)
    except (ValueError, TypeError) as error:
        # A setting, a batch or a loss that the measurement refuses, in its own words.
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        raise
    except Exception as error:  # noqa: BLE001 - one sentence for whoever reads the shell
        print(f"lla_callbacks: the measurement failed. {described(error)}", file=sys.stderr)
        return FAILED
    if not request.quiet:
        print("\n".join(lines))
        print(f"\nNumbers and figures are in {folder}/, all of it on one page: {page}")
    return DONE


def _folder(request: Request) -> Path:
    stem = "module" if request.checkpoint is None else request.checkpoint.stem
    folder = request.out or Path(f"lla_{stem}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"out: {folder} cannot be made: {error.strerror}.") from error
    return folder


def _keep(request: Request, folder: Path) -> None:
    """Write what was asked beside the results, to ask it again."""
    import yaml

    text = yaml.safe_dump(request.plain(), sort_keys=False)
    (folder / "measure.yaml").write_text(text, encoding="utf-8")
