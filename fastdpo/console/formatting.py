"""Numbers as people read them, and text that a terminal can be sent."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

_NOISE = 1e-12  # what sums of float64 leave of 0; nothing that is reported is so small


def all_ties(margin: float) -> bool:
    """Whether pairs with this mean margin over the reference tie: the policy is still the reference, up to
    rounding, and then an accuracy over it (0, as ties count) says nothing."""
    return abs(margin) < 1e-6


def significant(value: float, digits: int = 4) -> str:
    """0.6931, -120.3, 12,345, 1e-06: as many digits as mean something, no exponent where none is needed."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if abs(value) < _NOISE:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{digits - 1}g}".replace("-", "−", int(value < 0))
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """A change: +0.12, −3.4, 0."""
    text = significant(value, digits)
    return f"+{text}" if value > 0 and text != "0" else text


def percent(value: float) -> str:
    return f"{value:.1%}"


def gigabytes(size: float) -> str:
    """1.73 GB, 24.5 MB (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{significant(size / factor, 3)} {unit}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """0.4 s, 36 s, 5 min 12 s, 3 h 5 min, 2 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rest = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(filter(None, parts[:2]))


def about(seconds: float) -> str:
    """An estimate, no finer than it can be: about 40 s, about 12 min, about 3 h 5 min."""
    grains = ((100, 10), (600, 30), (3600, 60), (36000, 300))
    grain = next((grain for limit, grain in grains if seconds < limit), 3600)
    return f"about {duration(max(1, round(seconds / grain)) * grain)}"


def at_time(when: datetime, now: datetime) -> str:
    """18:40, Tue 18:40, 3 Dec: no more of it than is needed to find it."""
    if when.date() == now.date():
        return f"{when:%H:%M}"
    return f"{when:%a %H:%M}" if when - now < timedelta(days=6) else f"{when.day} {when:%b}"


def counted(number: int, noun: str) -> str:
    """1 row, 1,200 rows, 2 microbatches."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def first_few(items: Sequence, most: int = 5) -> str:
    """3, 7, 12, ...: no more than people read."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def printable(text: str) -> str:
    """The text with all that is not printable (controls, escapes, lone surrogates) spelt as in Python."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
