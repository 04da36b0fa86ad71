"""The page of a run: whole, offline, true to its files, and alive in a real browser."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lla_callbacks import basin_radii, loss_line, loss_plane, measure_hessian
from lla_callbacks.command.main import main
from lla_callbacks.hessian.scalars import BAND
from lla_callbacks.page.page import read_run, write_page
from lla_callbacks.page.runs import NoRunError, run_in
from lla_callbacks.page.slices import slices_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip
# A name that would end a script, and one that would begin a tag.
NAUGHTY = "</script><b>"


def loss(module: Any, batch: Any) -> Any:
    return cross_entropy(module(batch[0]), batch[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as monitors leave it, at three steps, with a curve of the user's own."""
    folder = tmp_path_factory.mktemp("logs") / "version_0"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(8, 3).double(), torch.randint(0, 2, (8,)))]
    settings: dict[str, Any] = {"loss": loss, "check": False}
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for step in (0, 10, 20):
        stem = f"step_{step:08d}.npz"
        measure_hessian(model, batches, num_steps=6, num_probes=4, **settings).save(
            folder / "hessian" / stem
        )
        plane = loss_plane(model, batches, alphas=axis, betas=axis, **settings)
        plane.save(folder / "landscape" / "plane_random" / stem)
        loss_line(model, batches, alphas=axis, **settings).save(
            folder / "landscape" / "line_random" / stem
        )
        basin_radii(model, batches, num_rays=3, **settings).save(
            folder / "landscape" / "basin" / stem
        )
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.3)
    (folder / "metrics.csv").write_text(
        f"step,epoch,train_loss,{NAUGHTY}\n0,0,1.5,1\n10,0,,2\n20,1,nan,3\n20,1,0.5,4\n"
    )
    return folder


def data_of(page: str) -> dict[str, Any]:
    block = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert block is not None
    found: dict[str, Any] = json.loads(block[1])
    return found


class Tags(html.parser.HTMLParser):
    """Notes what is opened and left open, and every attribute that could fetch something."""

    EMPTY = ("meta", "input", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.fetched += [v for name, v in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(run: Path, tmp_path: Path) -> None:
    page = write_page(run, tmp_path / "new" / "page.html", title=f"my {NAUGHTY} run").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.fetched == []
    assert "b" not in tags.seen  # the naughty names are text
    assert "my &lt;/script&gt;&lt;b&gt; run" in page
    addresses = set(re.findall(r"\w+://[^\s\"'<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a language, not a place
    # A clip path is named by url(#...), inside of the page.
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(|@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    assert page.count("@@") == 0


def test_the_page_says_what_the_files_say(run: Path) -> None:
    found = read_run(run)
    curves = {c["tag"]: c["points"] for c in found["curves"]}
    files = sorted((run / "hessian").glob("*.npz"))
    for k, file in enumerate(files):
        with np.load(file) as m:
            step, value, low, high = curves["hessian/trace"][k]
            assert step == 10 * k
            assert value == pytest.approx(float(m["trace"]), rel=1e-5)
            assert high - low == pytest.approx(2 * BAND * float(m["trace_sem"]), rel=1e-3)
            step, value, low, high, *_ = curves["hessian/lambda_max"][k]
            beyond, below = (float(m[f"lambda_{end}_beyond"]) for end in ("max", "min"))
            assert high - value == pytest.approx(beyond, abs=1e-5 * value)
            assert value - low == pytest.approx(float(m["lambda_max_residual"]), abs=1e-5 * value)
            ends = (curves[f"hessian/lambda_{end}"][k][4:] for end in ("max", "min"))
            frame = found["hessians"][0]["spectra"]["frames"][k]
            for words, (_, said) in zip(ends, (frame["top"], frame["bottom"]), strict=True):
                # An end of which only one side is sure is said as everywhere.
                assert words == ([said] if " to " in said else [])
    (hessian,) = found["hessians"]
    spectra = hessian["spectra"]
    # All eigenvalues are there: the counts a band add up to the number of parameters.
    cells = (spectra["ends"][1] - spectra["ends"][0]) / (len(spectra["frames"][0]["y"]) - 1)
    for frame in spectra["frames"]:
        counts = [y or 0.0 for y in frame["y"]]
        assert sum(counts) * cells / spectra["band"] == pytest.approx(26, rel=0.25)
    # None is drawn beyond the extremes.
    values = spectra["linear"] * np.sinh(np.linspace(*spectra["ends"], len(counts)))
    last = spectra["frames"][-1]
    drawn = values[[y is not None for y in last["y"]]]
    assert drawn.max() <= 1.001 * last["top"][0] + beyond
    assert drawn.min() >= last["bottom"][0] - 1e-3 * last["top"][0] - below
    assert [frame["step"] for frame in hessian["layers"]] == [0, 10, 20]
    assert dict(hessian["facts"])["parameters"] == "26"
    (slices,) = found["slices"]
    plane = slices["planes"][0]["frames"][0]
    with np.load(run / "landscape" / "plane_random" / "step_00000000.npz") as m:
        side, fine = len(m["alphas"]), len(plane["x"])
        factor = (fine - 1) // (side - 1)
        z = np.array(plane["z"]).reshape(fine, fine)[::factor, ::factor]
        assert np.allclose(10**z if plane["log"] else z, m["loss"], rtol=2e-3)
    assert [r[0] for r in slices["basin"]] == [0, 10, 20]
    # Curves of the user's own: what is not finite, and what is not of a step, is left out.
    own = {c["tag"]: [p[:2] for p in c["points"]] for c in found["own"]}
    assert own["train_loss"] == [[0, 1.5], [20, 0.5]]
    assert "epoch" not in own


def test_directions_are_named_as_at_each_step(tmp_path: Path) -> None:
    """Eigenvectors of two steps have two eigenvalues, and the slider shows one of them."""
    model, axis = nn.Linear(3, 2).double(), torch.linspace(-1, 1, 3, dtype=torch.float64)
    settings: dict[str, Any] = {"loss": loss, "check": False, "alphas": axis}
    batches = [(torch.randn(8, 3).double(), torch.randint(0, 2, (8,)))]
    kinds = {
        "plane_hessian": loss_plane(model, batches, betas=axis, **settings),
        "line_top1": loss_line(model, batches, **settings),
    }
    for folder, part in kinds.items():
        for step, name in ((0, "λ = 3"), (10, "λ = 14")):
            first, *others = part.directions
            named = (dataclasses.replace(first, name=name), *others)
            found = dataclasses.replace(part, directions=named)  # type: ignore[type-var]
            found.save(tmp_path / folder / f"step_{step:08d}.npz")  # type: ignore[attr-defined]
    slices = slices_of(tmp_path)
    assert slices is not None
    (plane,), (line,) = slices["planes"], slices["lines"]
    assert [f["axes"][0][:6].strip() for f in plane["frames"]] == ["λ = 3", "λ = 14"]
    assert [f["axis"][:6].strip() for f in line["frames"]] == ["λ = 3", "λ = 14"]


def test_light_measurements_join_the_curve(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    n = {
        name: np.full(2, 0.5) for name in ("trace_sem", "lambda_max_residual", "lambda_max_beyond")
    }
    np.savez(
        folder / "hessian" / "light_00000012_to_00000014.npz", steps=np.array([12, 14]),
        lambda_max=np.array([2.0, np.nan]), trace=np.array([3.0, 4.0]), loss=np.ones(2), **n,
    )  # fmt: skip
    curves = {c["tag"]: c["points"] for c in read_run(folder)["curves"]}
    assert [p[0] for p in curves["hessian/lambda_max"]] == [0, 10, 12, 20]
    assert curves["hessian/trace"][2] == [12, 3.0, 2.0, 4.0]


def test_a_broken_file_costs_its_part_only(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "landscape" / "line_random" / "step_00000010.npz").write_bytes(b"cut off")
    found = read_run(folder)
    assert found["hessians"]
    assert any("landscape/ could not be read" in note for note in found["notes"])


def test_the_newest_of_several_runs(run: Path, tmp_path: Path, capsys: Any) -> None:
    logs = tmp_path / "lightning_logs"
    for name in ("version_0", "version_1"):
        shutil.copytree(run, logs / name)
    newest = logs / "version_0" / "hessian" / "step_00000020.npz"
    os.utime(newest, (2e9, 2e9))
    assert run_in(logs) == (logs / "version_0", [logs / "version_1"])
    assert main(["report", str(logs)]) == 0
    assert "is the newest of 2 runs" in capsys.readouterr().out
    assert (logs / "version_0" / "report.html").is_file()


def test_what_is_no_run_is_told(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(NoRunError, match=r"holds no run.*lightning_logs/version_0"):
        run_in(tmp_path)
    assert main(["report", str(tmp_path / "lost")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["report", "--help"])
    assert left.value.code == 0
    assert "neither a server nor a network" in capsys.readouterr().out


# Runs before the page's own script, and after it; what is found is read from the page.
BEFORE = "<script>window.wrong=[];addEventListener('error',e=>wrong.push(e.message))</script>"
AFTER = """<script>
const dark = () => getComputedStyle(document.body).backgroundColor;
const canvas = document.querySelector('canvas'), picture = () => canvas.toDataURL();
const at = () => document.querySelector('#spectra .value').textContent;
const said = {}, one = picture(), before = [at(), dark()];
const slider = document.getElementById('step');
slider.value = 0; slider.dispatchEvent(new Event('input'));
said.step = [before[0], at(), document.getElementById('at').textContent];
said.moved = picture() !== one;
const two = picture();
canvas.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));
requestAnimationFrame(() => requestAnimationFrame(() => {
  said.turned = picture() !== two;
  document.getElementById('theme').click();
  said.theme = dark() !== before[1];
  const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  said.painted = new Set(all.data).size;
  said.curves = document.querySelectorAll('#curves .grid:first-of-type .card svg').length;
  said.bands = document.querySelectorAll('.band').length;
  said.own = [...document.querySelectorAll('#own h3 span:first-child')].map(e => e.textContent);
  said.wrong = window.wrong;
  document.documentElement.dataset.said = JSON.stringify(said);
}));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_real_browser(run: Path, tmp_path: Path) -> None:
    page = write_page(run, tmp_path / "page.html").read_text()
    page = page.replace("<head>", f"<head>{BEFORE}").replace("</body>", f"{AFTER}</body>")
    (tmp_path / "asked.html").write_text(page)
    found = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
         "--virtual-time-budget=30000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         f"file://{tmp_path / 'asked.html'}"],
        capture_output=True, text=True, timeout=120, check=False,
    ).stdout  # fmt: skip
    answer = re.search(r'data-said="([^"]*)"', found)
    assert answer is not None, found[-2000:]
    said = json.loads(html.unescape(answer[1]))
    assert said["wrong"] == []
    assert 'data-ready="true"' in found
    assert said["step"] == ["step 20", "step 0", "step 0"]
    assert said["moved"]
    assert said["turned"]
    assert said["theme"]
    assert said["painted"] > 50
    assert said["curves"] >= 6
    assert said["bands"] >= 3
    assert said["own"] == [NAUGHTY, "train_loss"]
