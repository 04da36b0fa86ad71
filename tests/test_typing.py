"""What a user's mypy says of our callbacks, with either Trainer. Half a minute: LLA_TYPES=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USER = """\
import lightning.pytorch as lp
import pytorch_lightning as pl

from lla_callbacks import HessianMonitor, HessianTraceRegularizer, LossLandscapeMonitor, standard

pl.Trainer(callbacks=[HessianMonitor(), LossLandscapeMonitor(), HessianTraceRegularizer(1e-3)])
lp.Trainer(callbacks=[HessianMonitor(), LossLandscapeMonitor(), HessianTraceRegularizer(1e-3)])
pl.Trainer(callbacks=standard())
lp.Trainer(callbacks=standard())
HessianMonitor(every_n_epochs="1")
"""


@pytest.mark.skipif("LLA_TYPES" not in os.environ, reason="half a minute: make test-types")
def test_either_trainer_takes_them_under_mypy(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent",
         f"--cache-dir={tmp_path}", str(tmp_path / "user.py")],
        capture_output=True, text=True, check=False, env={**os.environ, "MYPYPATH": str(ROOT)},
    ).stdout  # fmt: skip
    # One error, the one that is there; so mypy did look.
    assert [line.partition(": error: ")[2] for line in found.splitlines()[:-1]] == [
        'Argument "every_n_epochs" to "HessianMonitor" has incompatible type "str"; expected '
        '"int | None"  [arg-type]'
    ], found
