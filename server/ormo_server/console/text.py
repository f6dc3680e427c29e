"""Numbers and texts of a status as people read them."""

import math

from ormo_protos.limits import PHASES

NOT_KNOWN = "–"
_STEPS = (("s", 60), ("min", 60), ("h", 24), ("d", 0))
_UNITS = ("B", "kB", "MB", "GB", "TB")


def shortened(text: str, width: int) -> str:
    """At most `width` letters of the text, from both ends: made-up worker ids differ in their last ones."""
    if len(text) <= width:
        return text
    tail = width // 2
    return f"{text[: width - tail - 1]}…{text[len(text) - tail :]}"


def phase_word(phase: int) -> str:
    """What the server is doing, in one lower-case word; a newer server may know more than this program."""
    return PHASES.get(phase, f"phase_{phase}")


def duration(seconds: float) -> str:
    """Such as 4.2 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return NOT_KNOWN
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    smaller, number = "", round(seconds)
    for unit, size in _STEPS:
        if not size or number < size:
            return f"{number} {unit}{smaller}"
        number, rest = divmod(number, size)
        smaller = f" {rest} {unit}" if rest else ""
    raise AssertionError("the last unit has no end")


def memory(size: float) -> str:
    """Such as 273 MB, 1.5 GB."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if size < 1000 else f"{size:.0f} {_UNITS[unit]}"


def rate(per_second: float | None) -> str:
    """Per second, such as 0.25, 3.4, 6,784."""
    if per_second is None:
        return NOT_KNOWN
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"
