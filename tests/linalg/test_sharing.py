"""Processes fail together wherever one of them fails, and none waits for another."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lla_callbacks.linalg.errors import MeasurementError, OutOfMemoryError, described
from lla_callbacks.linalg.sharing import Alone, OutOfStepError, all_or_none, meet


class Table:
    """Where threads, in the place of processes, lay down what they exchange."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.laid: list[Tensor] = [torch.zeros(0)] * size


class Member:
    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank, self.size = table, rank, table.size
        self.depth = 0

    def exchange(self, values: Tensor, *, used_up: bool = False) -> Tensor:
        self.table.laid[self.rank] = values
        self.table.barrier.wait()
        laid = list(self.table.laid)
        self.table.barrier.wait()
        # What a backend would abort or hang on.
        assert len({tuple(t.shape) for t in laid}) == 1
        return torch.stack(laid).sum(0)

    def total(self, values: Tensor) -> Tensor:
        meet(self, f"sum of {values.numel()}")
        return self.exchange(values)

    def joined(self, pieces: Tensor, dim: int) -> Tensor:
        size = -(-dim // self.size)
        whole = pieces.new_zeros(dim, *pieces.shape[1:])
        whole[self.rank * size : self.rank * size + len(pieces)] = pieces
        return self.total(whole)

    def same(self, tensor: Tensor) -> Tensor:
        meet(self, f"copy of {tensor.numel()}")
        return self.exchange(tensor if self.rank == 0 else torch.zeros_like(tensor))


def together(size: int, work: Callable[[Member], Any]) -> list[Any]:
    """Return what each of so many members' work returns, or raises."""
    table = Table(size)
    found: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            found[rank] = work(Member(table, rank))
        except Exception as error:  # noqa: BLE001 - is looked at by the test
            found[rank] = error
            if isinstance(error, (threading.BrokenBarrierError, AssertionError)):
                table.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def script(source: random.Random, depth: int = 0) -> list[Any]:
    """Return random work: sums, copies, steps of one's own, parts, parts that may be missing."""
    kinds = ["sum", "copy", "own", "own"] + (["part", "tried"] if depth < 3 else [])
    made: list[Any] = []
    for _ in range(source.randint(1, 4)):
        kind = source.choice(kinds)
        inner = script(source, depth + 1) if kind in ("part", "tried") else source.randint(1, 5)
        made.append((kind, inner))
    return made


def steps(work: list[Any]) -> int:
    return sum(steps(x) if kind in ("part", "tried") else 1 for kind, x in work)


class Run:
    """Goes through a script, and fails at one of its steps."""

    def __init__(self, member: Member, fails_at: int | None) -> None:
        self.member, self.left = member, fails_at
        self.said: list[str] = []

    def all(self, work: list[Any]) -> list[str]:
        for number, (kind, inner) in enumerate(work):
            if kind == "part":
                all_or_none(self.member, lambda inner=inner: self.all(inner), f"part {number}")  # type: ignore[misc]
            elif kind == "tried":
                try:
                    all_or_none(self.member, lambda inner=inner: self.all(inner), f"try {number}")  # type: ignore[misc]
                except OutOfStepError:
                    raise
                except Exception as error:  # noqa: BLE001 - one part must not cost the others
                    self.said.append(str(error))
            else:
                if self.left is not None:
                    self.left -= 1
                    if self.left < 0:
                        self.left = None
                        raise ValueError(f"no luck with {kind} {number}")
                if kind == "sum":
                    self.member.total(torch.ones(inner))
                elif kind == "copy":
                    self.member.same(torch.ones(inner))
        return self.said


@pytest.mark.parametrize("seed", range(60))
def test_wherever_one_fails_all_fail_alike_and_none_waits(seed: int) -> None:
    source = random.Random(seed)
    work = script(source)
    size, fails_at = source.choice([2, 2, 3]), source.randrange(steps(work))
    unwell = source.randrange(size)

    def measure(member: Member) -> list[str]:
        run = Run(member, fails_at if member.rank == unwell else None)
        return all_or_none(member, lambda: run.all(work), "the measurement")

    found = together(size, measure)
    # The same in all: what was left out on the way, or how it ended.
    texts = {described(f) if isinstance(f, Exception) else repr(f) for f in found}
    assert len(texts) == 1, texts
    assert f"process {unwell} failed in this measurement (ValueError: no luck" in texts.pop()


def test_without_trouble_each_has_what_it_computed() -> None:
    found = together(
        3, lambda m: all_or_none(m, lambda: float(m.total(torch.ones(2)).sum()) + m.rank)
    )
    assert found == [6.0, 7.0, 8.0]


def test_processes_that_go_different_ways_notice_it() -> None:
    def measure(member: Member) -> Tensor:
        return member.total(torch.ones(3 + member.rank))

    for error in together(2, measure):
        assert isinstance(error, OutOfStepError)
        assert "different points of a measurement" in str(error)


def test_the_kind_of_an_error_is_the_same_in_all() -> None:
    def measure(member: Member) -> None:
        def compute() -> None:
            if member.rank == 1:
                raise OutOfMemoryError("there is none.", "Buy some.")

        all_or_none(member, compute)

    assert [type(error) for error in together(2, measure)] == [OutOfMemoryError] * 2


def test_an_error_whose_text_cannot_be_made_is_told_all_the_same() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def measure(member: Member) -> None:
        def compute() -> None:
            if member.rank == 0:
                raise MuteError

        all_or_none(member, compute)

    for error in together(2, measure):
        assert isinstance(error, MeasurementError)
        assert "MuteError: (its text cannot be made)" in str(error)


def test_what_fails_alike_in_all_keeps_its_own_words() -> None:
    def measure(member: Member) -> None:
        all_or_none(member, lambda: all_or_none(member, lambda: [][3]))

    for error in together(2, measure):
        assert isinstance(error, IndexError)


def test_one_process_alone_keeps_its_own_error_and_exchanges_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        all_or_none(Alone(), lambda: 1 / 0)
    assert all_or_none(Alone(), lambda: 3) == 3
