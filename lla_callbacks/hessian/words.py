"""Results in words, for people who have not read the papers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lla_callbacks.hessian.criteria import MAINLY_POSITIVE_ABOVE
from lla_callbacks.hessian.criteria_of import FAR_GAP
from lla_callbacks.hessian.engine_error import gap_remedy
from lla_callbacks.hessian.measures import HessianMeasurement
from lla_callbacks.linalg.eigenvalue import Eigenvalue
from lla_callbacks.report.words import spanned, with_error


def describe(measurement: HessianMeasurement) -> str:
    """Return what one measurement found, in a few lines with their uncertainty."""
    m = measurement
    c = m.criteria
    what = "Hessian" if m.is_hessian else "Jacobian of the training gradient, no Hessian,"
    if m.matrix == "ggn":
        what = "Gauss-Newton part of the Hessian"
    lines = [
        f"{what} of {m.num_params:,} parameters on {m.num_samples:,} samples, mode "
        f"'{m.mode}': {m.num_matvecs} products in {m.seconds:.2g} s.",
    ]
    if math.isfinite(m.lambda_max):
        lines.append(
            f"  largest eigenvalue  {spanned(m.lambda_max, 1)}"
            f"  (the sharpest direction; {_sure(m, m.lambda_max, 1)})"
        )
    if math.isfinite(m.lambda_min):
        lines.append(
            f"  smallest eigenvalue {spanned(m.lambda_min, -1)}"
            f"  (below zero: a direction that curves down; {_sure(m, m.lambda_min, -1)})"
        )
    if math.isfinite(m.trace):
        lines.append(
            f"  trace               {with_error(m.trace, m.trace_sem)}"
            "  (all curvature added up; the +- is one standard error)"
        )
    if math.isfinite(m.gauss_newton_share):
        share = with_error(m.gauss_newton_share, m.gauss_newton_share_error)
        whole = with_error(m.hessian_trace, m.hessian_trace_sem)
        lines.append(
            f"  share of the trace  {share}  (of the Hessian's, {whole}; the rest is where the "
            "network itself curves)"
        )
    if math.isfinite(m.filter_curvature):
        lines.append(
            f"  filter curvature    {with_error(m.filter_curvature, m.filter_curvature_sem)}"
            "  (mean along random directions as long as the filters; comparable between networks)"
        )
    if math.isfinite(c["c_t"]):
        ratio = with_error(c["c_t"], m.criteria_errors["c_t"])
        lines.append(f"  spectrum            smallest/largest {ratio}  ({_side(m)})")
        lines.append(
            f"  KH05                {with_error(c['kh05'], m.criteria_errors['kh05'])}  (negative "
            f"over positive part of the spectrum; compare it at the same num_steps, here "
            f"{m.num_steps})"
        )
    if m.engine == "difference":
        lines.append(
            f"  engine              differences of gradients, off by {m.product_error:.1g} along "
            f"random directions, since {m.engine_reason}"
        )
    lines += _gap_lines(m)
    if math.isfinite(c["gradient_share"]):
        lines.append(
            f"  gradient            {c['gradient_share']:.0%} of its square lies along the "
            "five sharpest directions"
        )
    if math.isfinite(c["stability"]):
        lines.append(
            f"  stability           {c['stability']:.2g} of the optimizer's limit (1 is the "
            "edge, where full-batch steps start to overshoot)"
        )
    if m.eigenvectors is not None:
        pairs = zip(m.eigenvectors.values.tolist(), m.eigenvectors.residuals.tolist(), strict=True)
        lines.append(f"  eigenvectors        of {', '.join(with_error(v, r) for v, r in pairs)}")
    lines += _layer_lines(m)
    if m.self_check is not None:
        lines += [f"  {line}" for line in m.self_check.lines()]
    lines += [f"  {note}" for note in m.notes]
    return "\n".join(lines)


def _sure(m: HessianMeasurement, end: Eigenvalue, sign: int) -> str:
    """Return what the error of an extreme eigenvalue says, or that its place is open."""
    if not end.is_open:
        return "the +- is its residual: how far it is off at most"
    low, _, high = spanned(end, sign).partition(" to ")
    found, limit = (low, f"no higher than {high}") if sign > 0 else (high, f"no lower than {low}")
    remedy = "no eig_rtol" if FAR_GAP in m.gaps else "a larger num_steps"
    return f"found at {found}, with 95 % certainty {limit}; {remedy} narrows it"


def _side(m: HessianMeasurement) -> str:
    """Return on which side of LLA's threshold the ratio of both ends lies, as far as is known."""
    away = m.criteria["c_t"] - MAINLY_POSITIVE_ABOVE
    if not abs(away) > m.criteria_errors["c_t"]:
        where = f"within its error of {MAINLY_POSITIVE_ABOVE}"
        return f"{where}, above which Gabdullin 2025 says mainly positive"
    side = "above" if away > 0 else "below"
    return f"{side} {MAINLY_POSITIVE_ABOVE}, which Gabdullin 2025 calls {m.spectrum_type}"


def _gap_lines(m: HessianMeasurement) -> list[str]:
    """Return what is missing and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, reason in m.gaps.items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"  no {', '.join(names):<16} {reason}" for reason, names in reasons.items()]
    if lines and m.self_check is not None and m.self_check.trouble:
        return [*lines, f"  {m.self_check.remedy}"]
    remedies = {gap_remedy(m.engine_reason, reason) for reason in reasons} - {""}
    return lines + [f"  {remedy}" for remedy in remedies]


def _layer_lines(m: HessianMeasurement) -> list[str]:
    if not m.layers:
        return []
    name, trace = max(m.layer_traces.items(), key=lambda item: item[1].value)
    lines = [
        f"  layers              most curvature in {name}: trace "
        f"{with_error(trace.value, trace.sem)}"
    ]
    spectra = {name: layer.spectrum for name, layer in m.layers.items() if layer.spectrum}
    if spectra:
        name, sharpest = max(spectra.items(), key=lambda item: float(item[1].lambda_max))
        top = sharpest.lambda_max
        lines.append(f"                      sharpest is {name}: {spanned(top, 1)}")
    distances = {
        name: (s.distance, s.distance_error)
        for name, s in spectra.items()
        if math.isfinite(s.distance)
    }
    if distances:
        name, nearest = min(distances.items(), key=lambda item: item[1][0])
        lines.append(
            f"                      most like the whole is {name}: distance "
            f"{with_error(*nearest)} (0 is the same shape; the +- is one standard error)"
        )
    if m.unlayered:
        lines.append(f"                      {outside_words(m)}")
    return lines


def outside_words(m: HessianMeasurement) -> str:
    """Return how many parameters belong to no chosen layer, empty if none do."""
    if not m.unlayered:
        return ""
    left = m.num_params - sum(layer.num_params for layer in m.layers.values())
    return f"{left:,} of {m.num_params:,} parameters belong to no chosen layer"


def describe_change(history: Sequence[tuple[int, HessianMeasurement]]) -> str:
    """Return how curvature moved over a run, from its first to its last measurement."""
    history = [(step, m) for step, m in history if math.isfinite(m.trace + m.lambda_max)]
    if len(history) < 2:
        return ""
    (first_step, first), (last_step, last) = history[0], history[-1]
    spread = math.hypot(first.trace_sem, last.trace_sem)
    moved = abs(last.trace - first.trace) > 2 * spread
    direction = "rose" if last.trace > first.trace else "fell"
    steepest_step, steepest = max(history, key=lambda item: item[1].trace)
    sharpest_step, sharpest = max(history, key=lambda item: float(item[1].lambda_max))
    lines = [
        f"From step {first_step} to {last_step} the trace "
        + (
            f"{direction} from {with_error(first.trace, first.trace_sem)} to "
            f"{with_error(last.trace, last.trace_sem)}."
            if moved
            else f"did not move by more than its error ({first.trace:.3g} to {last.trace:.3g})."
        )
        + f" Its highest measured value was {steepest.trace:.3g}, at step {steepest_step}.",
        f"The largest eigenvalue went from {float(first.lambda_max):.3g} to "
        f"{float(last.lambda_max):.3g}; its highest measured value was "
        f"{float(sharpest.lambda_max):.3g}, at step {sharpest_step}.",
    ]
    stable = [(s, m.criteria["stability"]) for s, m in history]
    crossed = [step for step, value in stable if value > 1]
    if crossed:
        lines.append(
            f"Stability was above 1 at {len(crossed)} of {len(history)} measurements: at those "
            "weights a full-batch step would overshoot along the sharpest direction."
        )
    elif any(math.isfinite(value) for _, value in stable):
        highest = max(value for _, value in stable if math.isfinite(value))
        lines.append(f"Stability stayed below 1 wherever it was measured (highest {highest:.2g}).")
    return "\n".join(lines)
