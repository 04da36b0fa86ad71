"""One of two processes fails in every place there is: both have the same gaps, and go on."""

import math

from .modules import differences
from .two_processes import in_two

# What is not there at the step where a place fails, by the names of the slices.
GAPS = {
    "the path": ["line_update"],
    "random directions": ["plane_random"],
    "moments": ["line_adam_m"],
    "components": ["plane_trajectory"],
    "copies": ["line_top1", "plane_trajectory"],
    "eigenvectors": ["line_top1"],
    "coordinates": ["plane_random"],
}
LAST = 17


def test_wherever_one_process_fails_both_have_the_same_gap_and_none_waits(tmp_path):
    found = in_two(tmp_path, "tests.callbacks.ddp_injected", ["without", "injected"])
    # A process that waits for the other does so until gloo gives up, and would be ended here.
    assert found.codes == [0, 0], found.output
    first, second = found("injected")
    for each, plain in zip((first, second), found("without"), strict=True):
        assert differences(each["weights"], plain["weights"]) == []
    assert first["missing"] == second["missing"]
    assert first["stability"].keys() == second["stability"].keys()
    where = {name: 5 + number for number, name in enumerate(first["order"])}
    assert set(GAPS) < set(where)
    # The start, of which the second process has no weights, is a gap.
    gaps = {0, where["the objective"], where["the bar"]}
    for steps in (first["missing"], first["stability"]):
        assert not gaps & set(steps)
        assert {*range(5, LAST + 1)} - gaps <= set(steps)
    for name, missing in GAPS.items():
        assert first["missing"][where[name]] == missing, name
    # Without a limit in one process there is no stability, and all else.
    stability = first["stability"]
    assert math.isnan(stability[where["the limit"]])
    # All is well afterwards.
    assert first["missing"][LAST] == []
    assert stability[LAST] > 0
    # What only the second process has seen, it says itself.
    assert any("in process 1: keeping weights" in text for text in second["warnings"])
    assert any("in process 1: the stability limit" in text for text in second["warnings"])
    assert any("process 1 failed in this measurement" in text for text in first["warnings"])
