"""What an objective has proved of itself, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["passed", "failed", "not decided", "not tried"]
# What is measured where the gradient is no derivative of the loss: nothing, or the Jacobian of
# the gradient all the same, marked as such.
Jacobian = Literal["gap", "measure"]

# What each check asks.
QUESTIONS = {
    "repeats": "two evaluations agree to the bit",
    "slope": "the gradient is the slope of the loss",
    "gradient": "the gradient is that of a plain backward pass",
    "symmetry": "products are symmetric",
    "product": "products agree with differences of gradients",
}
NO_ROOM = "there was not enough memory for a plain backward pass"
JACOBIAN_WORDS = (
    "the gradient that training uses is not the derivative of the loss (a stop-gradient, a "
    "reversed or straight-through gradient, a hook on a tensor), so that what comes from it is "
    "the Jacobian of that gradient and no Hessian"
)
JACOBIAN_REMEDY = (
    "Give loss=callable(module, batch) whose gradient is its derivative, or set "
    "jacobian='measure' to see the Jacobian, marked as such."
)
UNREPEATABLE_WORDS = (
    "two evaluations at the same weights and batches differ, so that something random or stateful "
    "is not held (a global, a closure, a file, a generator of one's own)"
)
UNREPEATABLE_REMEDY = (
    "Keep such state on the module, or give loss=callable(module, batch) without it; check=False "
    "measures all the same."
)


@dataclass(frozen=True)
class Check:
    """One question that an objective was asked.

    Attributes:
        name: Key of :data:`QUESTIONS`.
        outcome: ``"passed"``, ``"failed"``, ``"not decided"`` (rounding, kinks or a slope of
            zero leave no room to tell), or ``"not tried"``.
        error: Relative deviation; NaN without one.
        bound: What rounding and truncation, as far as they were measured, explain of it.
        words: What was seen, in a sentence's part; may be empty.
    """

    name: str
    outcome: Outcome
    error: float = float("nan")
    bound: float = float("nan")
    words: str = ""


@dataclass(frozen=True)
class SelfCheck:
    """What an objective proved of itself before its numbers were believed.

    Attributes:
        checks: Each question with its outcome, in the order of asking.
        num_gradients: What it cost, in gradients of the whole loss; products that the
            measurement itself goes on from are not counted.
        hooks: What was done with hooks that the forward pass puts on tensors: ``""`` if there
            are none, ``"left out"`` (they are training's, and not part of the derivative), or
            ``"kept"`` (the gradient is the derivative of the loss only with them).
        notes: Whatever else a reader should know of the loss.
    """

    checks: tuple[Check, ...] = ()
    num_gradients: float = 0.0
    hooks: str = ""
    notes: tuple[str, ...] = field(default=())

    def outcome(self, name: str) -> Outcome:
        """Return how a check came out; ``"not tried"`` if it was not asked."""
        found = [check.outcome for check in self.checks if check.name == name]
        return found[-1] if found else "not tried"

    @property
    def repeats(self) -> bool:
        """Whether the loss is a function of the weights, as far as was seen."""
        return self.outcome("repeats") != "failed"

    @property
    def is_hessian(self) -> bool:
        """Whether the derivative of the gradient is the Hessian, as far as was seen."""
        return self.repeats and self.outcome("slope") != "failed"

    @property
    def trouble(self) -> str:
        """Why no number of curvature is one of this loss's, in words; empty if it is."""
        if not self.repeats:
            return f"{UNREPEATABLE_WORDS} ({self._words('repeats')})"
        if not self.is_hessian:
            return f"{JACOBIAN_WORDS} ({self._words('slope')})"
        return ""

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return JACOBIAN_REMEDY if self.repeats else UNREPEATABLE_REMEDY

    def _words(self, name: str) -> str:
        return "; ".join(c.words for c in self.checks if c.name == name and c.outcome == "failed")

    @property
    def _open(self) -> list[Check]:
        """Checks that were not decided and concern a reader.

        Differences of gradients say nothing across the kinks of ReLU in float32, whatever the loss:
        where products are symmetric, that they were no further check is no news.
        """
        usual = self.outcome("symmetry") == "passed"
        return [
            c for c in self.checks
            if c.outcome == "not decided" and not (usual and c.name == "product")
        ]  # fmt: skip

    def lines(self) -> list[str]:
        """Return the outcome in words, a line each."""
        left = self._open
        asked = [c for c in self.checks if c.outcome in ("passed", "failed") or c in left]
        passed = sum(c.outcome == "passed" for c in asked)
        undecided = f", {len(left)} not decided" if left else ""
        price = f"at the price of {self.num_gradients:.2g} gradients"
        found = [f"self-check: {passed} of {len(asked)} passed{undecided}, {price}"]
        for check in self.checks:
            words = f": {check.words}" if check.words else ""
            if check in left:
                found.append(
                    f"not decided: whether {QUESTIONS[check.name]}{words}; in float64 (a module "
                    "and batches in double) it can be told"
                )
            elif check.outcome in ("failed", "not tried"):
                found.append(f"{check.outcome}: {QUESTIONS[check.name]}{words}")
        if self.hooks:
            found.append(
                "hooks on tensors are part of the derivative and kept"
                if self.hooks == "kept"
                else "hooks on tensors are not part of the derivative and left out"
            )
        return [*found, *self.notes]

    def footer(self, *, curvature: bool = True) -> str:
        """Return the outcome in a few words, for below a figure.

        Args:
            curvature: Whether the figure shows curvature, and not values of the loss alone.
        """
        if not self.repeats:
            return "self-check failed: the loss does not repeat"
        if not self.is_hessian and not curvature:
            return "self-check: values hold, training's gradient is not their slope"
        if not self.is_hessian:
            return "self-check failed: Jacobian of training's gradient, no Hessian"
        failed = [c.name for c in self.checks if c.outcome == "failed"]
        if failed:
            return f"self-check failed: {', '.join(failed)}"
        open_ones = [c.name for c in self._open]
        passed = "self-check passed"
        return passed + (f" (not decided: {', '.join(open_ones)})" if open_ones else "")


@dataclass(frozen=True)
class Proof:
    """What a run knows of its loss, and what a run that goes on from it need not ask again.

    Attributes:
        self_check: What the objective proved of itself; ``None`` as long as it was not asked.
        hooks_seen: Whether a forward pass put a hook on a tensor's gradient.
        keep_hooks: Whether such hooks are part of the derivative.
        proved: Engines whose products were asked too.
        lost: Why the exact engine's products are not the Hessian's, in words; empty if they are.
        notes: What a reader of any number should know of the loss.
        quiet: Names of submodules that were seen to drop at random; ``None`` as long as nothing
            is known of what is random.
        skipped: Places of held batches for which the training step returns no loss.
        kinks: How many values went through functions whose derivative jumps, as far as graphs
            show; ``None`` if that was not looked for.
    """

    self_check: SelfCheck | None = None
    hooks_seen: bool = False
    keep_hooks: bool = False
    proved: tuple[str, ...] = ()
    lost: str = ""
    notes: tuple[str, ...] = ()
    quiet: tuple[str, ...] | None = None
    skipped: tuple[int, ...] = ()
    kinks: int | None = None


def untried(name: str, why: str) -> Check:
    """Return that a check was not made, and why."""
    return Check(name, "not tried", words=why)
