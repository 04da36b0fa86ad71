"""Batches of a loader, over and over, in an order that a resumed run goes on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lla_callbacks.linalg.probes import generator
from lla_callbacks.objective.state import preserved_random_streams


class PoisonStream:
    """Passes over a loader one after the other, the batches shared out among processes.

    Whatever is random in a loader (its order, augmentation) starts, for each batch, from the
    seed, the pass and the batch's number: the training's random streams and a loader's own
    generator are left alone, and a position is all that a resumed run needs to know. Of
    ``count`` batches that are drawn together each process gets one, unless the loader's
    sampler shares out the samples itself.

    Args:
        loader: Any iterable of batches that can be gone through more than once.
        seed: Of the random streams.
        rank: Which of the processes this is.
        count: How many there are.

    Attributes:
        position: Pass, and batch within it, that comes next; the same in all processes.
    """

    def __init__(self, loader: Any, seed: int, rank: int = 0, count: int = 1) -> None:
        sampler = getattr(loader, "sampler", None)
        shares = getattr(sampler, "num_replicas", 1) > 1
        self._loader, self._sampler, self._seed = loader, sampler, seed
        self._rank, self._count = (0, 1) if shares else (rank, count)
        self._generators = [
            source
            for source in (getattr(loader, "generator", None), getattr(sampler, "generator", None))
            if isinstance(source, torch.Generator)
        ]
        self._iterator: Iterator[Any] | None = None
        self._ahead: tuple[Any, int] | None = None
        self._after = (0, 0)
        self.position = (0, 0)

    def go_to(self, position: tuple[int, int]) -> None:
        """Go on from a position; batches of its pass before it are fetched and dropped."""
        self.position = (int(position[0]), int(position[1]))
        self._iterator = self._ahead = None

    def peek(self) -> tuple[Any, int]:
        """Return what comes next, without going on; see :meth:`draw`."""
        position = self.position
        found = self.draw()
        after, self.position = self.position, position
        self._ahead, self._after = found, after
        return found

    def draw(self) -> tuple[Any, int]:
        """Return this process's next batch, and a seed that belongs to it.

        Raises:
            ValueError: If the loader is empty.
        """
        if self._ahead is not None:
            found, self._ahead, self.position = self._ahead, None, self._after
            return found
        drawn = [self._next(wanted=rank == self._rank) for rank in range(self._count)]
        return drawn[self._rank]

    def _next(self, *, wanted: bool) -> tuple[Any, int]:
        for _ in range(2):
            number, batch_number = self.position
            if self._iterator is None:
                if callable(getattr(self._sampler, "set_epoch", None)):
                    self._sampler.set_epoch(number)  # type: ignore[union-attr]
                with self._streams(number, 0):
                    self._iterator = iter(self._loader)
                for skipped in range(batch_number):
                    with self._streams(number, 1 + skipped):
                        next(self._iterator, None)
            with self._streams(number, 1 + batch_number):
                batch = next(self._iterator, self)
            if batch is not self:
                self.position = (number, batch_number + 1)
                return (batch if wanted else None), self._key(number, 1 + batch_number)
            self._iterator, self.position = None, (number + 1, 0)
        raise ValueError("dataloader has no batches: give one with at least one.")

    def _key(self, number: int, batch_number: int) -> int:
        return int(generator(self._seed, 7, number, batch_number).initial_seed())

    @contextmanager
    def _streams(self, number: int, batch_number: int) -> Iterator[None]:
        key = self._key(number, batch_number)
        states = [source.get_state() for source in self._generators]
        try:
            for source in self._generators:
                source.manual_seed(key)
            with preserved_random_streams(key):
                yield
        finally:
            for source, state in zip(self._generators, states, strict=True):
                source.set_state(state)
