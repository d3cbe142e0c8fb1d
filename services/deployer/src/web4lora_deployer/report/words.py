"""Figures as people read them."""

from __future__ import annotations


def size(size_bytes: float) -> str:
    """Write a size in decimal units: "105 MB"."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= limit:
            value = size_bytes / limit
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Write a time: "3 min 41 s", "24 s", "0.35 s", "42 ms"."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(value: float | None) -> str:
    """Write per cent without needless decimals: "97.5 %", "100 %"; a dash for None."""
    return "–" if value is None else f"{round(value, 1):g} %"


def number(value: float) -> str:
    """Write a count with separators: "107,648"."""
    return f"{value:,.0f}"


def loss(value: float) -> str:
    """Write a loss: "0.31"."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def reduction(share: float) -> str:
    """Write a reduction of size: "−61 %"."""
    return f"{-100 * share:+.0f} %".replace("-", "−")


def short_digest(digest: str) -> str:
    """Write the first 12 digits of a digest."""
    return digest.removeprefix("sha256:")[:12]


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: "1 prompt", "40 prompts"."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"
