"""One idea a file, so that each can be read at one sitting."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lla_callbacks"


def test_no_file_is_above_four_hundred_lines() -> None:
    counts = {p.name: len(p.read_text().splitlines()) for p in PACKAGE.glob("**/*.py")}
    assert {name: n for name, n in counts.items() if n > 400} == {}


def test_no_room_has_more_than_a_quarter_of_the_code() -> None:
    rooms = {d.name: sum(len(p.read_text().splitlines()) for p in d.glob("**/*.py"))
             for d in PACKAGE.iterdir() if d.is_dir()}  # fmt: skip
    assert max(rooms.values()) <= 0.25 * sum(rooms.values())
