"""Numbers in words."""

from __future__ import annotations

import math

from lla_callbacks.linalg.eigenvalue import Eigenvalue

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def with_error(value: float, error: float) -> str:
    """Return a number with as many digits as its error justifies, ``12.3 +- 0.4``."""
    if not math.isfinite(value):
        return "undefined"
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    # Two digits of the error; a value that is known better than six digits is cut there.
    digits = 1 - math.floor(math.log10(error))
    if value:
        digits = min(digits, 5 - math.floor(math.log10(abs(value))))
    if digits < 0:
        return f"{value:.3g} +- {error:.1g}"
    plain = error >= 1e-4 and error >= 5 * 10.0**-digits
    shown = f"{error:.{digits}f}" if plain else f"{error:.0e}"
    return f"{_unsigned(f'{value:.{digits}f}')} +- {shown}"


def _unsigned(shown: str) -> str:
    """Return a number without the sign of a zero."""
    return shown.removeprefix("-") if float(shown) == 0 else shown


def spanned(end: Eigenvalue, sign: int) -> str:
    """Return an extreme eigenvalue with its error, or from where to where it may lie if open.

    Args:
        end: The eigenvalue.
        sign: 1 for the largest, -1 for the smallest.
    """
    if not end.is_open:
        return with_error(float(end), end.residual)
    inner, outer = float(end), end + sign * end.beyond
    if math.isinf(outer):
        return " to ".join(f"{v:.3g}" for v in sorted((inner, outer)))
    # Two digits of how far it is open.
    digits = max(0, 1 - math.floor(math.log10(end.beyond)))
    if digits > 5 or max(abs(inner), abs(outer)) >= 1e5:
        # As many digits as tell both apart.
        size = math.floor(math.log10(max(abs(inner), abs(outer))))
        places = max(2, 1 + size - math.floor(math.log10(end.beyond)))
        low, high = (f"{v:.{places}e}" for v in sorted((inner, outer)))
    else:
        low, high = (_rounded(v, digits) for v in sorted((inner, outer)))
    return f"{low} to {high}"


def _rounded(value: float, digits: int) -> str:
    """Return a number with these digits, or with one that tells its sign where all are zero."""
    shown = f"{value:.{digits}f}"
    return f"{value:.1g}" if value and float(shown) == 0 else shown


def written(value: float) -> str:
    """Return a value for a tick: plain where that is short, a power of ten otherwise."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}".replace("-", "−")
    digits, power = f"{value:.2e}".split("e")
    factor = f"{float(digits):g}".replace("-", "−")
    exponent = "10" + str(int(power)).translate(_SUPERSCRIPTS)
    return {"1": exponent, "−1": f"−{exponent}"}.get(factor, f"{factor}·{exponent}")


def in_short(value: float, error: float) -> str:
    """Return a number for a headline: three digits, with an error that is seen in them."""
    if not math.isfinite(value):
        return "undefined"
    if math.isfinite(error) and error > 5e-3 * abs(value):
        return with_error(value, error).replace("+-", "±").replace("-", "−")
    return written(float(f"{value:.3g}"))


def end_in_short(end: Eigenvalue, sign: int) -> str:
    """Return an extreme eigenvalue for a headline, as :func:`spanned` where it is open."""
    if end.is_open:
        return spanned(end, sign).replace("-", "−")
    return in_short(float(end), end.residual)


def power(exponent: int) -> str:
    """Return a power of ten for a tick: plain from a hundredth to a thousand."""
    if -2 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(_SUPERSCRIPTS)
