"""What a network gives out at many points, and the loss as a function of that alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from lla_callbacks.linalg.sharing import Share
from lla_callbacks.objective.evaluation import Evaluator, evaluating
from lla_callbacks.objective.held_loss import HeldLoss

# Outputs of all points together that are kept, at most.
MOST_BYTES = 128 * 2**20
# Numbers that go into one pass of the loss, and points at most.
PASS_NUMBERS, PASS_POINTS = 2**20, 1024


class OutputRecorder:
    """A metric that keeps the outputs it is fed with; its value is their norm, which finds them.

    Args:
        gives: The module whose outputs these are.

    Attributes:
        gives: The same.
        found: Norm to the outputs of all batches.
    """

    def __init__(self, gives: nn.Module) -> None:
        self.gives = gives
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

    def join(self, share: Share) -> None:
        """Take the outputs of all processes that share the points; one exchange."""
        if share.size == 1:
            return
        mine = {norm: [t.cpu() for t in parts] for norm, parts in self.found.items()}
        device = next((t.device for parts in self.found.values() for t in parts), None)
        for found in share.union([mine]):
            for norm, parts in found.items():
                self.found.setdefault(norm, tuple(t.to(device) for t in parts))

    def of(self, norms: Sequence[float]) -> list[Tensor] | None:
        """Return the outputs with these norms, shapes ``(len(norms), *shape)``, one a batch.

        None if some were not recorded, or are not finite.
        """
        rows = [self.found.get(norm) for norm in norms]
        if any(row is None or not all(bool(t.isfinite().all()) for t in row) for row in rows):
            return None
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


class OutputLoss:
    """The loss as a function of a module's output, for use in :func:`loss_of_outputs`.

    Args:
        evaluate: The evaluator of the loss.
        giver: The module.
    """

    def __init__(self, evaluate: Evaluator, giver: nn.Module) -> None:
        self._evaluate = evaluate
        self._giver = giver
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
                with _giving(self._giver, output):
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
def loss_of_outputs(objective: HeldLoss, giver: nn.Module) -> Iterator[OutputLoss]:
    """Within this context losses follow from outputs without a forward pass; all is restored."""
    with evaluating(objective, check_weights=False) as evaluate:
        yield OutputLoss(evaluate, giver)


def giver_of(objective: HeldLoss, num_points: int) -> tuple[nn.Module | None, str]:
    """Return the module from whose output losses may follow, and why there is none.

    That is the module, or the part of it that the loss calls in its place (``self.net``). One pass
    over one batch tells. Whether losses do follow is seen at points, where both are known.

    Args:
        objective: The loss.
        num_points: At which outputs are to be kept.
    """
    name = type(objective.module).__name__
    for batch in objective.batches:
        pair = isinstance(batch, Sequence) and len(batch) >= 2 and isinstance(batch[1], Tensor)
        if not pair:
            return (
                None,
                f"a batch of type {type(batch).__name__} is no pair; give (inputs, targets)",
            )
    calls: list[tuple[nn.Module, Any]] = []
    with evaluating(objective) as evaluate:
        evaluate._guarded(0, lambda module, batch: _watched(objective, batch, calls), ())
    if len(calls) != 1:
        return None, (
            f"the loss calls {name}, or trained parts of it, {len(calls)} times a batch; give one "
            "that does so once"
        )
    (giver, output), name = calls[0], type(calls[0][0]).__name__
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        found = type(output).__name__
        return None, f"{name} gives a {found}, not one tensor; give a module that does"
    share = objective.counts[0] / objective.num_samples
    size = output.numel() * output.element_size() / share * num_points
    if size > MOST_BYTES:
        return None, (
            f"the outputs at {num_points:,} points take {size / 2**20:,.0f} MiB; give num_samples"
        )
    return giver, ""


def _watched(objective: HeldLoss, batch: Any, calls: list[tuple[nn.Module, Any]]) -> Tensor:
    """Return the loss, and note the calls of trained modules that none of them makes itself."""
    calls.clear()
    depth = 0

    def enter(module: nn.Module, *_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls.append((module, output))

    hooks = []
    try:
        for m in objective.module.modules():
            trained = any(p.requires_grad for p in m.parameters())
            if trained and not isinstance(m, torch.jit.ScriptModule):
                hooks += [m.register_forward_pre_hook(enter), m.register_forward_hook(leave)]
        return objective.loss(objective.module, batch)
    finally:
        for hook in hooks:
            hook.remove()


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
