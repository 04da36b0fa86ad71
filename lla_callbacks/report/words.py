"""Numbers in words."""

from __future__ import annotations

import math


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
    return f"{value:.{digits}f} +- {shown}"
