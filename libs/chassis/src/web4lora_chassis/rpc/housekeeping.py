"""What a worker does beside its jobs: forget what is no longer kept, and watch the room on its disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.keeping import GB, Keeping, disk_warning

log = logging.getLogger(__name__)

DISK_SECONDS = 30.0
URGENT_SECONDS = 300.0
"""Between two times that something is looked for to remove because the disk is nearly full."""
_PRUNE_SECONDS = 3600.0

Prune = Callable[[Keeping, bool], int]
"""Removes what a service keeps besides its jobs, given the bounds and whether the disk is nearly full.

It returns how much room that freed, in bytes.
"""


class Housekeeping:
    """Prunes every hour, and as soon as the disk is nearly full.

    Args:
        place: The service's home, whose disk is watched.
        runner: Its jobs.
        keep: The bounds.
        more: What it keeps besides.
    """

    def __init__(self, place: Path, runner: JobRunner, keep: Keeping, more: Prune | None = None) -> None:
        self._place = place
        self._runner = runner
        self._keep = keep
        self._more = more
        self._pruned_at = self._urgent_at = float("-inf")
        self.notice = ""
        """A line about a disk that is nearly full; the progress of jobs at work shows it."""

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("pruning failed; it is tried again")
            await asyncio.sleep(DISK_SECONDS)

    async def look(self) -> None:
        """Prune when it is time, or when there is no more room; warn while there is none."""
        warning = await asyncio.to_thread(disk_warning, self._place, self._keep)
        now = time.monotonic()
        urgent = bool(warning) and now - self._urgent_at > URGENT_SECONDS
        if urgent or now - self._pruned_at > _PRUNE_SECONDS:
            self._pruned_at = now
            if urgent:
                self._urgent_at = now
            freed = await self._runner.prune(self._keep, urgent=urgent)
            if self._more:
                freed += await asyncio.to_thread(self._more, self._keep, urgent)
            if freed:
                log.info("%.1f GB freed", freed / GB)
                warning = await asyncio.to_thread(disk_warning, self._place, self._keep)
        if warning and warning != self.notice:
            log.warning("%s", warning)
        self.notice = warning
