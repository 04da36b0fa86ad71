"""A checkpoint of two processes holds the batches of both, for two processes or one."""

import pytest
import torch

from lla_callbacks import LossLandscapeMonitor

from .ddp_resume import SETTINGS, part
from .two_processes import in_two


@pytest.mark.filterwarnings("ignore:.*trajectory failed")
def test_two_processes_go_on_as_two_or_as_one(tmp_path):
    cases = ["whole", "first", "second"]
    found = in_two(tmp_path, "tests.callbacks.ddp_resume", cases)
    assert found.codes == [0, 0], found.output
    for case in cases:
        one, other = found(case)
        assert one == other
    whole, first, second = (found(case)[0] for case in cases)
    # 32 samples, 4 a batch and process: 4 steps an epoch.
    assert (whole["steps"], first["steps"]) == ([0, 2, 4, 6, 8], [0, 2, 4])
    # Later losses differ by dropout, whose random stream Lightning does not restore.
    assert second["losses"][:3] == whole["losses"][:3] == first["losses"]
    assert second["steps"] == whole["steps"]
    # A quantity of one's own, on 16 samples in 4 batches.
    assert [own[0] for own in whole["own"]] == [own[0] for own in second["own"]] == [0, 2, 4, 6, 8]
    assert second["own"][:3] == whole["own"][:3] == first["own"]
    assert all(ratio > 0 for _, *own in whole["own"] for ratio in own)
    assert set(whole["samples"]) == set(second["samples"]) == {16}
    watcher = LossLandscapeMonitor(**SETTINGS)
    part(tmp_path, "alone", 2, tmp_path / "first.ckpt", devices=1, watcher=watcher)
    # One process takes twice the steps an epoch; the batches stay those of both.
    alone = torch.load(tmp_path / "alone_0.pt")
    assert alone["steps"][:3] == first["steps"]
    assert alone["losses"][:3] == first["losses"]
    assert set(alone["samples"]) == {16}
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"][watcher.state_key]
    again = torch.load(tmp_path / "alone.ckpt", weights_only=True)["callbacks"][watcher.state_key]
    for one, other in zip(state["held"]["batches"], again["held"]["batches"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
