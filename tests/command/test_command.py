"""The command line: a real checkpoint in, numbers and a page out; and what it says otherwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lla_callbacks import measure_hessian
from lla_callbacks.command.main import main
from tests.callbacks.modules import quiet_trainer
from tests.command import project

HERE = "tests.command.project"
# Two probes and a short run: milliseconds.
CHEAP = "hessian: {num_steps: 3, num_probes: 2}\nslices: {plane_points: 3, line_points: 5}\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    trainer = quiet_trainer(folder)
    trainer.fit(project.Net(width=4), project.batches())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: Any, config: str = CHEAP
) -> tuple[int, str, str]:
    (tmp_path / "measure.yaml").write_text(config)
    out = tmp_path / "out"
    code = main(
        [*map(str, arguments), "--config", str(tmp_path / "measure.yaml"), "--out", str(out)]
    )
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_checkpoint_becomes_numbers_figures_and_a_page(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        tmp_path, capsys, f"{HERE}.Net", "--checkpoint", checkpoint, "--data", f"{HERE}.Data",
        "--data-arg", "factor=2.0", "--seed", "5",
    )  # fmt: skip
    assert code == 0
    assert "largest eigenvalue" in out
    folder = tmp_path / "out"
    step = "step_00000004.npz"  # which the checkpoint knows
    written = {str(p.relative_to(folder)) for p in folder.glob("**/*") if p.is_file()}
    assert written >= {
        f"hessian/{step}", f"landscape/plane_random/{step}", f"landscape/line_top1/{step}",
        "figures/density.png", "figures/plane_random.png", "figures/lines.png", "summary.txt",
        "report.html", "measure.yaml",
    }  # fmt: skip
    # The numbers are those of the function, on the batches that the data module's hook made.
    module = project.Net.load_from_checkpoint(checkpoint, map_location="cpu")
    batches = [[2.0 * x, y] for x, y in project.batches()]
    wanted = measure_hessian(module, batches, num_steps=3, num_probes=2, seed=5)
    with np.load(folder / "hessian" / step) as found:
        assert float(found["lambda_max"]) == float(wanted.lambda_max)
        assert float(found["trace"]) == wanted.trace
    # What was asked is kept, and asked again gives the same.
    before = (folder / "hessian" / step).read_bytes()
    again = main(
        ["--config", str(folder / "measure.yaml"), "--out", str(tmp_path / "b"), "--quiet"]
    )
    assert (again, capsys.readouterr().out) == (0, "")
    with np.load(tmp_path / "b" / "hessian" / step) as found:
        assert float(found["trace"]) == wanted.trace
    assert before == (folder / "hessian" / step).read_bytes()


def test_a_plain_module_from_a_state_dict_by_its_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(project.__file__)
    code, _, said = run(
        tmp_path, capsys, f"{file}:bare", "--checkpoint", checkpoint, "--prefix", "net.",
        "--data", f"{file}:batches", "--loss", f"{file}:loss", "--planes", "--lines",
    )  # fmt: skip
    assert (code, said) == (0, "")
    torch.save(project.bare().state_dict(), tmp_path / "plain.pt")
    code, _, said = run(
        tmp_path, capsys, f"{HERE}.bare", "--checkpoint", tmp_path / "plain.pt", "--no-hessian",
        "--data", f"{HERE}.batches", "--loss", f"{HERE}.loss", "--lines", "random", "--samples", 8,
        config="slices: {plane_points: 3, line_points: 5}",
    )  # fmt: skip
    assert (code, said) == (0, "")


def test_what_the_functions_take_stands_in_a_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, said = run(
        tmp_path, capsys, f"{HERE}.WithData", "--checkpoint", checkpoint, "--planes",
        config="hessian: {num_steps: 3, num_probes: 2, matrix: ggn, parameters: [net.0*]}\n"
        "slices: {line_points: 5}\nlines: [top1]\n",
    )  # fmt: skip
    assert (code, said) == (0, "")
    assert "Gauss-Newton" in out
    assert "16 parameters" in out


def test_the_modules_own_data(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(
        tmp_path, capsys, f"{HERE}.WithData", "--checkpoint", checkpoint, "--planes", "--lines"
    )
    assert (code, said) == (0, "")


NET = (f"{HERE}.Net", "--checkpoint", "CHECKPOINT", "--data", f"{HERE}.batches")
REFUSED = [
    (("project.Net",), "there is no module 'project' here"),
    ((f"{HERE}.Nett",), "has no Nett. Did you mean Net?"),
    (("nowhere.py:Net",), "there is no file nowhere.py"),
    (("Net",), "give an import path such as project.models.Net"),
    (NET[:1], "no checkpoint for .*first weights would be measured. Give --checkpoint"),
    ((NET[0], "--checkpoint", "lost.ckpt"), "there is no file lost.ckpt"),
    ((NET[0], "--checkpoint", "FOLDER"), "is a folder.*consolidate_checkpoint"),
    ((NET[0], "--checkpoint", "NOISE"), "cannot be read"),
    ((NET[0], "--checkpoint", "CLASSES"), "could run any code. If you know who wrote it.*--trust"),
    ((f"{HERE}.Other", *NET[1:]), r"keys 2 missing in it \(head.weight, head.bias\). Give the"),
    ((f"{HERE}.bare", *NET[1:]), "missing in it .*unknown to the module.*give --prefix net"),
    ((*NET, "--module-arg", "width=5"), "(of another shape|size mismatch)"),
    ((*NET, "--module-arg", "depth=5"), "cannot be called.*'depth'"),
    (NET[:3], "no data: give --data, a LightningDataModule or a function"),
    ((*NET[:4], f"{HERE}.nothing"), "data: .* has no nothing"),
    ((*NET[:4], f"{HERE}.broken"), "data: .*broken.* ended in OSError: the disk is not there"),
    ((*NET[:4], f"{HERE}.dataset"), "is a TensorDataset, whose items are samples"),
    ((*NET[:4], f"{HERE}.Data", "--split", "val"), r"several loaders \(list\) for split val"),
    ((*NET[:4], f"{HERE}.Data", "--split", "all"), "split is 'all'; give one of train, val"),
    ((*NET[:4], f"{HERE}.Data", "--data-arg", "sizes=3"), "cannot be called.*'sizes'.*--data-arg"),
    ((*NET, "--samples", "many"), "samples is 'many'; give a whole number"),
    ((*NET, "--mode", "train"), "mode is 'train'; give one of batch"),
    ((*NET, "--planes", "top"), "planes: directions is 'top'; give one of random"),
    ((*NET, "--device", "gpu"), "device is 'gpu', which cannot be had"),
    ((*NET, "--no-hessian", "--planes", "--lines"), "there is nothing to measure"),
    ((*NET, "--loss", f"{HERE}.Net"), "loss is the class Net; give loss"),
    ((), "no module: name the class that made the checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_is_told_in_a_sentence(
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"CHECKPOINT": checkpoint, "FOLDER": tmp_path, "NOISE": tmp_path / "noise.ckpt",
              "CLASSES": tmp_path / "classes.ckpt"}  # fmt: skip
    places["NOISE"].write_bytes(b"not a checkpoint")
    torch.save({"state_dict": {}, "hyper_parameters": {"path": tmp_path}}, places["CLASSES"])
    config = "seed: 1" if "--no-hessian" in arguments else CHEAP
    code, out, said = run(tmp_path, capsys, *(places.get(a, a) for a in arguments), config=config)
    assert (code, out) == (2, "")
    assert said.startswith("lla_callbacks: ")
    assert re.search(message, " ".join(said.split())), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("modul: x", "'modul' is no option. Did you mean module?"),
        ("[1, 2]", "holds no names with values"),
        ("a: [", "is no YAML"),
        ("hessian: {steps: 3}", "hessian: 'steps' is no setting.*num_steps"),
        ("hessian: {num_steps: 1}", "num_steps is 1; give a whole number of at least 2"),
        ("hessian: {seed: 1}", "hessian: give seed as seed, once for everything"),
        ("slices: 3", "slices is 3; give names with values below it"),
        ("module: {class: x}", "give an import path, or class_path"),
    ],
)
def test_what_a_file_says_wrong_is_told(
    config: str,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = () if "module" in config else NET
    arguments = [checkpoint if a == "CHECKPOINT" else a for a in given]
    code, _, said = run(tmp_path, capsys, *arguments, config=config)
    assert code == 2
    assert re.search(message, " ".join(said.split())), said


def test_a_measurement_that_fails_is_one_line_and_exit_code_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, said = run(
        tmp_path, capsys, f"{HERE}.bare", "--checkpoint", checkpoint, "--prefix", "net.",
        "--data", f"{HERE}.batches", "--loss", f"{HERE}.bad_loss",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert said.startswith("lla_callbacks: the measurement failed. NonFiniteError: the loss")
    assert "Traceback" not in said


def test_a_bar_is_shown_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lla_callbacks.command.measuring import bar

    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    seen, quiet = Terminal(), Terminal()
    for quietly, terminal in ((False, seen), (True, quiet)):
        monkeypatch.setattr(sys, "stderr", terminal)
        with bar("Hessian", 4, quietly) as advance:
            advance(4)
    assert "Hessian" in seen.text
    assert quiet.text == ""


def test_as_a_program(checkpoint: Path, tmp_path: Path) -> None:
    """One process for all that only a process shows: python -m, the code, where help goes."""
    (tmp_path / "measure.yaml").write_text(CHEAP)
    (tmp_path / "mine.py").write_text(Path(project.__file__).read_text())
    program = (
        "import runpy, sys\n"
        "codes = []\n"
        "for given in (['--help'], ['mine.Nett'], sys.argv[1:]):\n"
        "    sys.argv = ['lla_callbacks', *given]\n"
        "    try: runpy.run_module('lla_callbacks', run_name='__main__')\n"
        "    except SystemExit as error: codes.append(error.code)\n"
        "print(codes)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, "mine.Net", "--checkpoint", str(checkpoint), "--data",
         "mine.Data", "--config", "measure.yaml", "--planes", "--lines", "--quiet"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(project.__file__).parents[2])},
    )  # fmt: skip
    assert found.stdout.rstrip().endswith("[0, 2, 0]"), found.stdout + found.stderr
    assert "usage: python -m lla_callbacks" in found.stdout
    assert "report LOGDIR" in found.stdout
    assert (tmp_path / "lla_last" / "report.html").is_file()
