"""What a user is told: above the bars, and once."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
from lightning_utilities.core import rank_zero
from tqdm.auto import tqdm

from lla_callbacks.callbacks.compat import say
from lla_callbacks.callbacks.telling import Said, above_bars, rank_zero_info, rank_zero_warn


class Terminal:
    """One screen for both streams, as a shell has it."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def lines(text: str) -> list[str]:
    """Return what a screen shows: a carriage return goes back to the beginning of its line."""
    shown = []
    for line in text.split("\n"):
        row: list[str] = []
        for part in line.split("\r"):
            row[: len(part)] = part
        shown.append("".join(row).rstrip())
    return shown


def show(text: str, *args: object, **kwargs: object) -> None:
    print(f"warning: {text}", file=sys.stderr)


@pytest.mark.parametrize("tell", [rank_zero_warn, rank_zero_info])
def test_a_message_stands_on_a_line_of_its_own(
    tell: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(warnings, "warn", show)
    handler = logging.StreamHandler(screen)  # type: ignore[arg-type]
    logger = rank_zero.log  # Lightning puts its own there
    logger.addHandler(handler)
    try:
        with tqdm(total=3, desc="Epoch 0", file=sys.stdout, ncols=60, mininterval=0) as bar:
            bar.update()
            tell("it is far away")  # type: ignore[operator]
            bar.update()
    finally:
        logger.removeHandler(handler)
    told = [line for line in lines(screen.text) if "far away" in line]
    assert len(told) == 1
    assert "Epoch" not in told[0]
    assert lines(screen.text)[-1].startswith("Epoch") or "Epoch" in lines(screen.text)[-2]


def test_without_bars_nothing_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tqdm")
    with above_bars():
        pass
    with pytest.warns(UserWarning, match="it is far away"):
        rank_zero_warn("it is far away")


def test_what_another_one_has_told_is_not_new() -> None:
    said = Said()
    assert said.is_new("hessian", "no")
    assert not said.is_new("landscape", "no")
    # Whoever was first may say it again, of another run of the same process, say.
    assert said.is_new("hessian", "no")


@pytest.mark.parametrize("named", ["info", "say"])
def test_a_line_of_the_log_stands_above_a_display_of_rich(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = pytest.importorskip("rich.console")
    live = pytest.importorskip("rich.live")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)  # type: ignore[arg-type]
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    logger = rank_zero.log if named == "info" else logging.getLogger("pytorch_lightning")
    logger.addHandler(handler)
    tell = rank_zero_info if named == "info" else partial(say, trainer)
    shown = console.Console(file=screen, force_terminal=True, width=60)
    try:
        with live.Live("THE BAR", console=shown, auto_refresh=False) as display:
            display.refresh()
            tell("it is far away")
            at = screen.text.index("it is far away")
            # Once, after what the display drew before was erased, and it is drawn again below.
            assert screen.text.count("it is far away") == 1
            assert "\x1b[2K" in screen.text[:at][screen.text[:at].rindex("THE BAR") :]
            assert "THE BAR" in screen.text[at:]
            assert handler.stream is screen
    finally:
        logger.removeHandler(handler)
