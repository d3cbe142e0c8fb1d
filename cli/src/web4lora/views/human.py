"""Numbers for people: decimal sizes, times in words, thousands with commas."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

_SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
MINUS = "−"


def size(count_bytes: float) -> str:
    """Return a size in decimal units: 105 MB, 1.9 GB."""
    for factor, unit in _SIZES:
        if count_bytes >= factor * 0.9995:
            value = count_bytes / factor
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
    return f"{count_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Return a time span: 0.4 s, 24 s, 3 min 41 s, 2 h 5 min."""
    if seconds < 0.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def about(seconds: float) -> str:
    """Return a time span without false precision: 10 s, 4 min, 2 h 10 min."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if seconds < 3570:
        return f"{round(seconds / 60)} min"
    hours, minutes = divmod(10 * round(seconds / 600), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def number(value: float) -> str:
    """Return a number with three significant digits, or whole with commas: 0.31, 12.5, 107,648."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def loss(value: float) -> str:
    """Return a loss: 0.30, 1.25, 0.004."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def count(quantity: int, noun: str) -> str:
    """Return a quantity with its noun: 1 row, 840 rows."""
    return f"{quantity:,} {noun}" if quantity == 1 else f"{quantity:,} {noun}s"


def signed(value: float) -> str:
    """Return a number with one decimal and a real minus sign: −2.1, 0.0, 3.0."""
    rounded = round(value, 1) + 0.0
    return f"{MINUS if rounded < 0 else ''}{abs(rounded):.1f}"


def moment(stamp: Timestamp) -> str:
    """Return a time as people here write it: 2026-11-22 14:05; empty when it is not set."""
    if not stamp.seconds:
        return ""
    return stamp.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def elapsed(start: Timestamp, end: Timestamp) -> float:
    """Return the seconds from a start to an end, or to now when it has none; 0 without a start."""
    if not start.seconds:
        return 0.0
    last = end.ToDatetime(tzinfo=UTC) if end.seconds else datetime.now(UTC)
    return max(0.0, (last - start.ToDatetime(tzinfo=UTC)).total_seconds())
