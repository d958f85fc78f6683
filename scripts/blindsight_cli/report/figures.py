"""How the report writes numbers: always with a unit, never with more digits than are known.

count(36412) == "36,412"      percent(0.923) == "92.3%"    seconds(0.0123) == "12.3 ms"
flops(1.25e12) == "1.25 TFLOP"   nats(0.0027) == "0.0027"    points(0.005) == "+0.5"
"""

from __future__ import annotations

import math

_MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """A share in [0, 1] as percent: one decimal, two significant digits below 1%."""
    value = 100 * share
    if value == 0 or value >= 0.995:
        return f"{value:.1f}%"
    return f"{_significant(value, 2)}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, signed; the unit stands in the column's head."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", _MINUS)


def seconds(value: float) -> str:
    """A duration with three significant digits, in µs, ms, s or min."""
    if value >= 100:
        return f"{value / 60:.1f} min"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * scale:
            return f"{_significant(value / scale, 3)} {unit}"
    return f"{_significant(value / 1e-6, 3)} µs"


def ratio(value: float) -> str:
    """A factor with three significant digits: `2.70×`."""
    return f"{_significant(value, 3)}×"


def two(value: float) -> str:
    """Two decimals: retained mass, output error."""
    return f"{value:.2f}"


def nats(value: float) -> str:
    """A divergence with two significant digits; in powers of ten below 1e-4."""
    if 0 < abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", _MINUS)
    return _significant(value, 2).replace("-", _MINUS)


def flops(value: float) -> str:
    """Floating-point operations with three significant digits and a decimal prefix."""
    scale, unit = flops_unit(value)
    return f"{_significant(value / scale, 3)} {unit}" if scale > 1 else f"{value:.0f} {unit}"


def flops_unit(value: float) -> tuple[float, str]:
    """The prefixed unit that suits a number of floating-point operations, and how many of them it stands for."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return scale, f"{prefix}FLOP"
    return 1.0, "FLOP"


def parameters(value: int) -> str:
    """A number of parameters: `1.40 M`, `7.62 B`."""
    for suffix, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return f"{_significant(value / scale, 3)} {suffix}"
    return str(value)


def margin(agreement: float, n_questions: int) -> float:
    """Half the width of a 95% interval for the difference of two accuracies on the same questions.

    The two can only differ where the answers do, so the variance of the difference is at most the share of unequal
    answers; that share is estimated with one unequal answer added, so that it never vanishes.
    """
    unequal = (n_questions * (1 - agreement) + 1) / (n_questions + 2)
    return 1.96 * math.sqrt(unequal / n_questions)


def _significant(value: float, digits: int) -> str:
    """Fixed notation with at least `digits` significant digits, trailing zeros kept."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"
