"""What a network gives out at many points, and the loss as a function of that alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from lla_callbacks.objective.evaluation import Evaluator, evaluating
from lla_callbacks.objective.held_loss import HeldLoss

# Outputs of all points together that are kept, at most.
MOST_BYTES = 128 * 2**20
# Numbers that go into one pass of the loss, and points at most.
PASS_NUMBERS, PASS_POINTS = 2**20, 1024


class OutputRecorder:
    """A metric that keeps the outputs it is fed with; its value is their norm, which finds them.

    Attributes:
        found: Norm to the outputs of all batches.
    """

    def __init__(self) -> None:
        self.found: dict[float, tuple[Tensor, ...]] = {}
        self._parts: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> OutputRecorder:
        return self

    def to(self, device: Any) -> OutputRecorder:
        """Return itself: outputs stay on their device."""
        return self

    def reset(self) -> None:
        """Begin with a point."""
        self._parts = []

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take the output for a batch."""
        self._parts.append(output.detach().clone())

    def compute(self) -> Tensor:
        """End with a point, and return the norm of its outputs."""
        squares = [float(part.double().square().sum()) for part in self._parts]
        norm = float(sum(squares) ** 0.5)
        self.found[norm] = tuple(self._parts)
        return torch.tensor(norm, dtype=torch.float64)

    def of(self, norms: Sequence[float]) -> list[Tensor] | None:
        """Return the outputs with these norms, shapes ``(len(norms), *shape)``, one a batch.

        None if some were not recorded, or are not finite.
        """
        rows = [self.found.get(norm) for norm in norms]
        if any(row is None or not all(bool(t.isfinite().all()) for t in row) for row in rows):
            return None
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


class OutputLoss:
    """The loss as a function of the module's output, for use in :func:`loss_of_outputs`.

    Args:
        evaluate: The evaluator of the loss.
    """

    def __init__(self, evaluate: Evaluator) -> None:
        self._evaluate = evaluate
        self._vmap = True

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return losses at outputs, shape ``(n,)``, float64 on the CPU.

        Args:
            outputs: Shapes ``(n, *shape)``, one a batch.
        """
        counts = self._evaluate.objective.counts
        total = torch.zeros(len(outputs[0]), dtype=torch.float64)
        for i, (count, given) in enumerate(zip(counts, outputs, strict=True)):
            total += count / sum(counts) * self._batch(i, given)
        return total

    def _batch(self, i: int, given: Tensor) -> Tensor:
        def one(output: Tensor) -> Tensor:
            def loss(module: Any, batch: Any) -> Tensor:
                with _giving(module, output):
                    return self._evaluate.objective.loss(module, batch)

            found: Tensor = self._evaluate._guarded(i, loss, ())
            return found.reshape(())

        size = max(1, min(PASS_POINTS, PASS_NUMBERS // max(given[0].numel(), 1)))
        parts = []
        for chunk in torch.split(given, size):
            if self._vmap:
                try:
                    parts.append(vmap(one, randomness="same")(chunk))
                    continue
                except Exception:  # noqa: BLE001 - vmap knows not every operation; the loop does
                    self._vmap = False
            parts.append(torch.stack([one(output) for output in chunk]))
        return torch.cat(parts).detach().double().cpu()


@contextmanager
def loss_of_outputs(objective: HeldLoss) -> Iterator[OutputLoss]:
    """Within this context losses follow from outputs without a forward pass; all is restored."""
    with evaluating(objective, check_weights=False) as evaluate:
        yield OutputLoss(evaluate)


def why_not(objective: HeldLoss, num_points: int) -> str:
    """Return why losses do not follow from the module's outputs; empty if they may.

    One pass over one batch tells. Whether they do is seen at points, where both are known.

    Args:
        objective: The loss.
        num_points: At which outputs are to be kept.
    """
    name = type(objective.module).__name__
    for batch in objective.batches:
        pair = isinstance(batch, Sequence) and len(batch) >= 2 and isinstance(batch[1], Tensor)
        if not pair:
            return f"a batch of type {type(batch).__name__} is no pair; give (inputs, targets)"
    seen: list[Any] = []
    with evaluating(objective) as evaluate:

        def observed(module: Any, batch: Any) -> Tensor:
            seen.clear()
            hook = module.register_forward_hook(lambda m, a, out: seen.append(out))
            try:
                return objective.loss(module, batch)
            finally:
                hook.remove()

        evaluate._guarded(0, observed, ())
    if len(seen) != 1:
        return f"the loss calls {name} {len(seen)} times a batch; give one that does so once"
    if not (isinstance(seen[0], Tensor) and seen[0].is_floating_point()):
        return f"{name} gives a {type(seen[0]).__name__}, not one tensor; give a module that does"
    share = objective.counts[0] / objective.num_samples
    size = seen[0].numel() * seen[0].element_size() / share * num_points
    if size > MOST_BYTES:
        return (
            f"the outputs at {num_points:,} points take {size / 2**20:,.0f} MiB; give num_samples"
        )
    return ""


@contextmanager
def _giving(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Within this context a module computes nothing: it returns this output."""
    before = dict(module.__dict__)
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        # Some put a forward of their own into the instance.
        if "forward" in before:
            module.__dict__["forward"] = before["forward"]
        else:
            del module.__dict__["forward"]
