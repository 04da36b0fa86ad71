"""Arguments that several callables take mean the same, in words and by default, wherever they are.

So ``help()``, an editor and LightningCLI show each with its meaning; here it is held to one place.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import lla_callbacks as lla
from lla_callbacks.callbacks.monitor_settings import GROUPS

MONITORS = [lla.Monitor, lla.HessianMonitor, lla.LossLandscapeMonitor]
SLICES = [lla.loss_plane, lla.interpolate, lla.convexity_map, lla.basin_radii]
# What a monitor says in its own words, since it is not quite the same there.
OF_ITS_OWN = {
    "every_n_epochs", "every_n_train_steps",  # what happens with neither
    "num_samples",  # which other sizes are chosen likewise
    "mode",  # which modes there are
    "save_arrays", "name", "custom_scalars",  # files, tags and layout
}  # fmt: skip
# Likewise of the functions about slices, beside loss_line.
OF_THEIR_OWN = {
    "module", "batches", "directions", "alphas",  # how many points, of what
    "time_budget",  # points or rays
    "seed",  # what is random
}  # fmt: skip


def words_of(thing: Any, head: str = "Args:") -> dict[str, str]:
    """Return what a docstring says of each argument."""
    lines = inspect.getdoc(thing).split(head, 1)[1].split("\n")[1:]
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if not line.strip():
            break
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, rest = start.groups()
            found[name] = rest
        else:
            found[name] += f" {line.strip()}"
    return found


GROUP_WORDS = {name: text for g in GROUPS for name, text in words_of(g, "Attributes:").items()}
DEFAULTS = {f.name: f.default for group in GROUPS for f in dataclasses.fields(group)}


@pytest.mark.parametrize("monitor", MONITORS, ids=lambda m: m.__name__)
def test_monitors_take_the_groups_of_settings(monitor: type) -> None:
    words, taken = words_of(monitor), inspect.signature(monitor).parameters
    shared = taken.keys() & DEFAULTS.keys()
    # A layout of charts is of the Hessian's tags.
    assert DEFAULTS.keys() - shared <= {"custom_scalars"}
    assert words.keys() == taken.keys()
    assert {n: taken[n].default for n in shared - {"name"}} == {
        n: DEFAULTS[n] for n in shared - {"name"}
    }
    same = shared - OF_ITS_OWN
    assert {n: words[n] for n in same} == {n: GROUP_WORDS[n] for n in same}


@pytest.mark.parametrize("function", SLICES, ids=lambda f: f.__name__)
def test_functions_about_slices_take_what_loss_line_takes(function: Callable[..., Any]) -> None:
    words, whole = words_of(function), words_of(lla.loss_line)
    taken, base = (inspect.signature(f).parameters for f in (function, lla.loss_line))
    shared = (taken.keys() & base.keys()) - {"alphas"}
    assert {n: taken[n].default for n in shared} == {n: base[n].default for n in shared}
    same = shared - OF_THEIR_OWN
    assert len(same) >= 8
    assert {n: words[n] for n in same} == {n: whole[n] for n in same}


@pytest.mark.parametrize("name", [n for n in lla.__all__ if inspect.isfunction(getattr(lla, n))])
def test_every_argument_is_explained_where_it_stands(name: str) -> None:
    function = getattr(lla, name)
    words = words_of(function)
    assert words.keys() == inspect.signature(function).parameters.keys()
    assert [n for n, text in words.items() if text.startswith("See ")] == []
