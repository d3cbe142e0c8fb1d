"""Progress of bytes that are fetched, stored or sent."""

from __future__ import annotations

from collections.abc import Callable

from web4lora_chassis.jobs.record import Progress


def byte_progress(
    report: Callable[[Progress], None], phase: str, total: int, message: str = ""
) -> Callable[[int], None]:
    """Return what takes how many bytes were moved since it was last called, and reports how many that makes.

    Args:
        report: Takes progress.
        phase: The step at work, in words.
        total: Bytes of all of it.
        message: One line for people.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(phase, done, total, "bytes", message=message))

    return advance
