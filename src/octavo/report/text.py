"""Formatting numbers and strings for people."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeGuard

from octavo.system.visible import visible

NOT_MEASURED = "not measured"


def known(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # An integer that does not fit a float.
        return False


def plain(value: object, limit: int = 160) -> str:
    """Return ``value`` as one printable line of at most ``limit`` characters.

    Names come from untrusted files, so invisible characters are written as escapes.
    """
    line = visible(value)
    # The middle is dropped, because layers differ at the start of names and roles at the end.
    return line if len(line) <= limit else f"{line[: limit // 2 - 1]}…{line[len(line) - limit // 2 :]}"


def figures(value: Any) -> str:
    """Return a number with three significant digits, such as ``0.0031`` or ``6,100``."""
    if not known(value):
        return NOT_MEASURED
    size = abs(value)
    if size >= 999.5:
        return f"{value:,.0f}" if size < 1e15 else f"{value:.2e}"
    if size and size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def size(value: Any) -> str:
    """Return bytes in decimal units, such as ``11.29 MB``."""
    if not known(value):
        return NOT_MEASURED
    if abs(value) < 1000:
        return f"{value:.0f} B"
    if abs(value) < 999_500:
        return f"{value / 1e3:#.3g} kB".replace(". ", " ")
    for unit, scale in (("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if abs(value) < 999.95 * scale or unit == "TB":
            scaled = value / scale
            break
    return f"{scaled:.2f} {unit}" if abs(scaled) < 99.995 else f"{scaled:.1f} {unit}"


def ratio(value: Any) -> str:
    """Return a compression ratio, such as ``8.05×``."""
    if not known(value):
        return NOT_MEASURED
    return f"{value:.2f}×" if value < 100 else f"{figures(value)}×"


def percent(part: Any, whole: Any = 1.0) -> str:
    """Return ``part / whole`` as a percentage with one decimal."""
    if not known(part) or not known(whole) or not whole:
        return "–"
    return f"{100 * part / whole:.1f} %"


def count(value: Any) -> str:
    """Return a number of things, short from a million upwards: ``22.7 million``."""
    if not known(value):
        return NOT_MEASURED
    for unit, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:,.0f}"


def things(number: int, name: str, plural: str = "") -> str:
    """Return ``number`` with its noun: ``1 tensor``, ``38 tensors``."""
    return f"{number:,} {name if number == 1 else plural or name + 's'}"


def duration(seconds: Any) -> str:
    """Return a time, such as ``0.3 s`` or ``12 min 5 s``."""
    if not known(seconds):
        return NOT_MEASURED
    if seconds < 119.5:
        return f"{figures(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def timed(value: Any, unit: Any) -> str:
    """Return a measured latency with its unit."""
    return f"{figures(value)} {plain(unit, 12)}" if known(value) else NOT_MEASURED


def moment(stamp: Any) -> str:
    """Return an ISO 8601 time as ``22 November 2026, 03:00 UTC``; other strings are unchanged."""
    try:
        when = datetime.fromisoformat(str(stamp))
    except ValueError:
        return plain(stamp, 60)
    when = when.astimezone(UTC) if when.tzinfo else when
    return f"{when.day} {when:%B %Y, %H:%M}{' UTC' if when.tzinfo else ''}"


def setting(value: Any) -> str:
    """Return a method's setting as ``bits=4, group=64``."""
    if not isinstance(value, Mapping):
        return plain(value, 120) if value else "–"
    shown = ((key, figures(item) if isinstance(item, float) else item) for key, item in value.items())
    return plain(", ".join(f"{key}={item}" for key, item in shown), 120) or "–"


def script(value: Any) -> str:
    """Return a command with its line breaks, otherwise made printable."""
    return "\n".join(plain(line, 2000) for line in str(value).splitlines()[:40])


def shape(value: Any) -> str:
    """Return a shape as ``384 × 384``."""
    return plain(" × ".join(str(n) for n in value or ()), 60) or "scalar"
