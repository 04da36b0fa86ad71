"""The Hessian of an objective by the first engine that can, once it has proved itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

from lla_callbacks.linalg.errors import (
    MeasurementError,
    NonFiniteError,
    NoSecondDerivativeError,
    OutOfMemoryError,
    forgetful,
)
from lla_callbacks.linalg.loss_operator import NOT_FINITE, LossOperator
from lla_callbacks.linalg.sharing import Share
from lla_callbacks.objective.objective import Engine, Objective
from lla_callbacks.objective.product_checks import prove_products
from lla_callbacks.objective.self_check import SelfCheck
from lla_callbacks.objective.value_checks import prove_values

Result = TypeVar("Result")
ASKED = "engine='difference' was asked for"


def with_hessian(
    objective: Objective,
    use: Callable[[LossOperator], Result],
    *,
    chunk_size: int = 1,
    share: Share | None = None,
) -> tuple[Result, str]:
    """Use the Hessian of an objective, by the first engine that can; return why it was that.

    The exact engine is tried first. Differences of gradients take over where a second
    derivative does not exist, is lost, is not finite, or does not fit in memory, or where
    parameters are sharded. Before its first use on a run's held batches the objective proves
    itself, unless it was told not to; what that showed is in ``objective.findings.self_check``.

    Args:
        objective: The loss.
        use: What to do with the Hessian; called anew with the second engine if the first fails.
        chunk_size: Vectors in one backward pass.
        share: Processes that share the work.

    Returns:
        What ``use`` returns, and the reason for differences, empty for the exact engine.

    Raises:
        MeasurementError: If the loss or a product is not finite or cannot be had, if the loss
            does not repeat, or if its gradient is no derivative of it and
            ``objective.jacobian`` does not ask for what there is instead.
    """
    return objective.without_skipped(
        lambda: _with_hessian(objective, use, chunk_size=chunk_size, share=share)
    )


def _with_hessian(
    objective: Objective,
    use: Callable[[LossOperator], Result],
    *,
    chunk_size: int,
    share: Share | None,
) -> tuple[Result, str]:
    engines, reason = engines_of(objective, share)
    failed: MeasurementError | None = None
    for last, engine in enumerate(engines, start=1):
        try:
            with objective.hessian(chunk_size=chunk_size, engine=engine, share=share) as hessian:
                prove_engine(objective, hessian)
                return use(hessian), reason
        except MeasurementError as error:
            if isinstance(error, NonFiniteError) and failed and failed.message == NOT_FINITE:
                # Differences go where the loss is not defined: the first one says why.
                raise failed from None
            if last == len(engines) or not is_for_differences(error):
                raise_last(error, reason)
            failed = forgetful(error)
        reason = f"{type(failed).__name__}: {failed}"
    raise AssertionError("an objective has at least one engine")


def engines_of(objective: Objective, share: Share | None = None) -> tuple[Sequence[Engine], str]:
    """Return the engines to be tried, in order, and why it is not the exact one, or nothing.

    Raises:
        MeasurementError: If the objective proved that it has no Hessian.
    """
    found = prove(objective, share)
    refuse_other_derivatives(objective, found)
    differs = found is not None and not found.is_hessian
    if differs and "difference" in objective.engines and objective.engine == "auto":
        # Double backward takes for constant what was detached.
        return ("difference",), (
            "the gradient is no derivative of the loss, and differences see all of it"
        )
    if objective.engine == "difference":
        return objective.engines, ASKED
    if objective.engines[0] == "difference":
        return objective.engines, (
            "the parameters are sharded, and torch differentiates through that once only"
        )
    return objective.engines, ""


def is_for_differences(error: MeasurementError) -> bool:
    """Return whether differences of gradients may tell what the exact engine cannot.

    A product that is not finite is one: autograd takes the second derivative of the square of a
    norm for 0 / 0 at zero, where the gradient is right.
    """
    kinds = (NoSecondDerivativeError, OutOfMemoryError)
    return isinstance(error, kinds) or error.message == NOT_FINITE


def raise_last(error: MeasurementError, reason: str) -> NoReturn:
    """Raise what the last engine failed at, with a remedy that was not tried.

    Args:
        error: The error.
        reason: Why it is not the exact engine, or nothing.
    """
    if isinstance(error, NoSecondDerivativeError):
        hint = "Or take engine='auto', which measures what differences can tell."
        raise NoSecondDerivativeError(str(error), hint) from error
    if reason and reason != ASKED and "engine='exact'" in error.remedy:
        # The way back would be a circle.
        raise type(error)(error.message, _instead(reason)) from None
    raise error


def _instead(reason: str) -> str:
    """Return what helps where the exact engine failed, and differences cannot either."""
    if reason.startswith(OutOfMemoryError.__name__):
        return "Raise max_memory, or lower num_samples or the size of the held batches."
    return "Give loss=callable(module, batch) by operations that differentiate twice."


def prove(objective: Objective, share: Share | None = None) -> SelfCheck | None:
    """Return what the values of a loss say of its gradient; asked once on its held batches.

    ``None`` if the objective is not to be checked.
    """
    if not objective.check:
        return None
    findings = objective.findings
    if findings.proof.self_check is None:
        found = objective.without_skipped(lambda: prove_values(objective, share))
        findings.learn(self_check=found)
    return findings.proof.self_check


def refuse_other_derivatives(objective: Objective, found: SelfCheck | None) -> None:
    """Raise if a self-check showed that there is no Hessian to be measured.

    Raises:
        MeasurementError: With what was seen and what can be done.
    """
    if found is not None and refuses(objective, found):
        raise MeasurementError(f"{found.trouble}.", found.remedy)


def refuses(objective: Objective, found: SelfCheck) -> bool:
    """Return whether nothing of curvature is to be measured, by what a self-check showed."""
    wanted = found.repeats and objective.jacobian == "measure"
    return bool(found.trouble) and not wanted


def prove_engine(objective: Objective, hessian: LossOperator) -> None:
    """Let an engine prove its products, once on the held batches.

    Raises:
        NoSecondDerivativeError: If the exact engine's are not those of the gradient.
    """
    findings = objective.findings
    known = findings.proof.self_check
    if known is None or not objective.check:
        return
    if hessian.engine == "exact" and findings.proof.keep_hooks:
        raise NoSecondDerivativeError(
            "a hook that the forward pass puts on a tensor is part of the derivative, and autograd "
            "cannot differentiate what it computes.",
            "Take engine='difference', or let loss=callable(module, batch) do without the hook.",
        )
    if not known.is_hessian:
        # A Jacobian need not be symmetric.
        return
    proved = hessian.engine if hessian.matrix == "hessian" else hessian.matrix
    if proved not in findings.proof.proved:
        found = prove_products(objective, hessian)
        earlier = tuple(c for c in known.checks if c.name in ("repeats", "slope"))
        findings.learn(
            proved=(*findings.proof.proved, proved),
            lost=found.lost or findings.proof.lost,
            self_check=replace(
                known,
                checks=earlier + found.checks,
                num_gradients=known.num_gradients + found.num_gradients,
            ),
        )
    if hessian.engine == "exact" and findings.proof.lost:
        lost = findings.proof.lost
        raise NoSecondDerivativeError(
            f"the second derivative is lost on the way ({lost}): an operation's backward pass "
            "cannot be differentiated and does not say so.",
            "Take engine='difference', or replace the operation (torch.autograd.gradgradcheck "
            "finds it).",
        )
