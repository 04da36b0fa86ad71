"""Films: read back by Pillow, every picture in one scale and of one size."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lla_callbacks import HessianReport, LossPlane, animate, measure_hessian
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.page import film
from tests.slices.test_slice_figures import bowl, plane_of

STEPS = (0, 10, 40)


def planes() -> list[tuple[int, LossPlane]]:
    """A plane that sinks by a factor of ten from picture to picture."""
    return [
        (step, LossPlane.of(plane_of(lambda a, b, k=k: 10.0**-k * bowl(a, b))))
        for k, step in enumerate(STEPS)
    ]


@pytest.fixture(scope="module")
def reports() -> list[tuple[int, HessianReport]]:
    torch.manual_seed(0)
    report = measure_hessian(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), [torch.randn(16, 3)],
        loss=lambda m, b: m(b).square().mean(), num_steps=6, num_probes=3,
    )  # fmt: skip
    return [
        (
            step,
            dataclasses.replace(
                report,
                nodes=report.nodes * k,
                eigenvalues=report.eigenvalues * k,
                lambda_max=Eigenvalue(float(report.lambda_max) * k, 0.0),
                lambda_min=Eigenvalue(float(report.lambda_min) * k, 0.0),
            ),
        )
        for k, step in enumerate(STEPS, 1)
    ]


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        assert image.n_frames == len(STEPS)
        found = []
        for k in range(image.n_frames):
            image.seek(k)
            found.append(np.asarray(image.convert("RGB")).astype(int))
    return found


@pytest.mark.parametrize("what", ["density", "layers", "plane"])
def test_a_film_has_a_picture_a_step_and_a_line_that_grows(
    tmp_path: Path, what: str, reports: list[tuple[int, HessianReport]]
) -> None:
    history = planes() if what == "plane" else reports
    path = animate(history, tmp_path / "deep" / "film.gif", what=what, width=320, fps=5)
    found = frames(path)
    assert len({frame.shape for frame in found}) == 1
    width = found[0].shape[1]
    assert 318 <= width <= 320
    # A line at the bottom, as long as the run is done.
    lengths = [int((frame[-1].sum(axis=1) < 600).sum()) for frame in found]
    assert lengths == [2, round(0.25 * width), width]
    assert all(np.abs(a - b).mean() > 0.5 for a, b in pairwise(found))
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        assert image.info["duration"] == 200


def test_all_pictures_have_one_scale(reports: list[tuple[int, HessianReport]]) -> None:
    drawn = film._planes(planes(), "", None)
    assert len({(f.axes[1]._colorbar.norm.vmin, f.axes[1]._colorbar.norm.vmax) for f in drawn}) == 1
    low = drawn[0].axes[1]._colorbar.norm.vmin
    assert low == pytest.approx(-4)
    drawn = film._densities(reports, "Sharp", None)
    assert [f._suptitle.get_text() for f in drawn] == [f"Sharp at step {s}" for s in STEPS]
    for k in range(2):
        assert len({(f.axes[k].get_xlim(), f.axes[k].get_ylim()) for f in drawn}) == 1
        assert len({tuple(f.axes[k].get_xticks()) for f in drawn}) == 1
    assert drawn[0].axes[0].get_xlim()[1] > float(reports[-1][1].lambda_max)


def test_files_of_a_monitor_are_a_history(
    tmp_path: Path, reports: list[tuple[int, HessianReport]]
) -> None:
    folder = tmp_path / "plane_random"
    for step, plane in planes():
        plane.save(folder / f"step_{step:08d}.npz")
    assert len(frames(animate(folder, tmp_path / "a.gif", width=200))) == 3
    paths = sorted(folder.glob("*.npz"))
    assert film._as_pairs(paths)[2][0] == 40
    for step, report in reports:
        report.save(tmp_path / "hessian" / f"step_{step:08d}.npz")
    assert [type(r) for _, r in film._as_pairs(tmp_path / "hessian")] == [HessianReport] * 3


def test_a_film_as_mp4_goes_through_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in, since ffmpeg need not be there: it keeps what it is given.
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor last; do :; done\ncat > "$last"\n')
    program.chmod(0o755)
    monkeypatch.setattr(film.shutil, "which", lambda name: str(program))
    monkeypatch.chdir(tmp_path)
    path = animate(planes(), tmp_path / "film.mp4", width=120, fps=2)
    # Three pictures, and the last one for a second and a half more, of even sides.
    height = len(path.read_bytes()) / (6 * 3 * 120)
    assert height == int(height)
    assert height % 2 == 0
    program.write_text("#!/bin/sh\necho no such codec >&2\nexit 1\n")
    with pytest.raises(ValueError, match="ffmpeg refused: no such codec"):
        animate(planes(), tmp_path / "film.mp4", width=120)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "film.avi"}, r"path is '.*film.avi'; give one that ends in .gif or .mp4"),
        ({"path": "film.mp4"}, "film.mp4 needs ffmpeg, which is not there; give a path with .gif"),
        ({"what": "movie"}, 'what is \'movie\'; give "plane", "density", "layers" or None'),
        ({"what": "density"}, "nothing in the history can be drawn as 'density'"),
        ({"fps": 0}, "fps is 0; give pictures a second, more than 0"),
        ({"width": 10}, "width is 10; give"),
        ({"history": 7}, "history is of type int; give a monitor, its history, a folder"),
        ({"history": [3]}, "history holds a int; give pairs of step and result, or paths"),
        ({"history": []}, "there are 0 results to draw; give a history with two or more"),
        ({"history": planes()[:1]}, "there is 1 result to draw"),
        ({"history": "nowhere.npz"}, "nowhere.npz is no file step_<number>.npz"),
    ],
)
def test_what_cannot_be_filmed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str
) -> None:
    monkeypatch.setattr(film.shutil, "which", lambda name: None)
    path = tmp_path / settings.pop("path", "film.gif")
    with pytest.raises(ValueError, match=message):
        animate(settings.pop("history", planes()), path, **settings)
    assert not path.exists()
