"""The rule of verdicts, and that every study runs to its end."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
sys.path.insert(0, str(STUDIES))

import claims  # noqa: E402
from study import Study, judged  # noqa: E402

NAMES = sorted(p.stem for p in STUDIES.glob("*.py") if p.stem not in ("study", "claims"))


@pytest.mark.parametrize(
    ("count", "low", "high", "agree", "smallest", "verdict"),
    [
        (5, 0.1, 0.5, 5, 0.0, "confirmed"),
        (5, 0.1, 0.5, 4, 0.0, "confirmed"),
        (5, 0.1, 0.5, 3, 0.0, "not decided"),  # a few large effects make no rule
        (5, -0.5, -0.1, 0, 0.0, "refuted"),
        (5, -0.1, 0.2, 4, 0.0, "not decided"),
        (5, -0.1, 0.2, 4, 0.3, "refuted"),  # too small to matter
        (5, 0.1, 0.2, 5, 0.3, "confirmed"),
        (2, 0.1, 0.2, 2, 0.0, "not decided"),
        (5, math.nan, math.nan, 5, 0.0, "not decided"),
    ],
)
def test_the_rule(count, low, high, agree, smallest, verdict):
    assert judged(count, low, high, agree, smallest) == verdict


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "--seeds", "4", "--out", str(tmp_path)])
    monkeypatch.setattr(Study, "_quiet", lambda self: None)
    return Study("some", "About it.", seeds=(5, 2))


def test_effects_are_paired_by_seed_and_claims_go_into_one_table(study, tmp_path, monkeypatch):
    for seed in study.seeds:
        study.row(arm="a", seed=seed, x=2.0 + seed)
    for seed in reversed(study.seeds):
        study.row(arm="b", seed=seed, x=1.0 + seed)
    assert study.paired("x", {"arm": "a"}, {"arm": "b"}) == [1.0] * 4
    ratios = study.paired("x", {"arm": "a"}, {"arm": "b"}, log=True)
    assert ratios == [math.log((2 + s) / (1 + s)) for s in range(4)]
    study.claim("C1", "a is larger", "us", "a over b", ratios, ratio=True)
    study.claim("C2", "b is larger", "us", "b over a", [-r for r in ratios], ratio=True)
    study.claim("C3", "nothing", "us", "nan", [math.nan])
    study.finish(["arm", "seed", "x"], {})
    stored = json.loads((tmp_path / "some.json").read_text())
    assert [c["verdict"] for c in stored["claims"]] == ["confirmed", "refuted", "not decided"]
    assert len(stored["rows"]) == 8
    page = tmp_path / "claims.md"
    page.write_text(f"Before.\n{claims.START}\nold\n{claims.END}\nAfter.\n")
    monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path), str(page)])
    claims.main()
    claims.main()
    text = page.read_text()
    assert text.count("[`python examples/studies/some.py --seeds 4`](some.md)") == 1
    assert text.count("| C2: b is larger | us | b over a | 4 |") == 1
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "old" not in text
    table = (tmp_path / "some.md").read_text()
    assert "| C1: a is larger | us | a over b | 4 |" in table
    assert "| a | 0 | 2 |" in table


@pytest.mark.skipif(not os.environ.get("LLA_STUDIES"), reason="minutes; set LLA_STUDIES=1")
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_ends_with_its_files_and_is_the_same_again(name, tmp_path):
    written = []
    for run in ("first", "second"):
        command = [
            sys.executable,
            str(STUDIES / f"{name}.py"),
            "--quick",
            "--out",
            str(tmp_path / run),
        ]
        subprocess.run(command, check=True, timeout=600)
        written.append((tmp_path / run / f"{name}.md").read_text())
        assert list((tmp_path / run).glob(f"{name}*.png"))
    assert written[0] == written[1]
