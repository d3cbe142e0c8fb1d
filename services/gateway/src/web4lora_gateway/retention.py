"""What the gateway does by itself about what piles up, by the settings; and its warnings of a full disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from web4lora_chassis.errors import FailedPrecondition, NotFound, Unavailable
from web4lora_chassis.keeping import DAY_SECONDS, GB, disk_warning
from web4lora_chassis.rpc.housekeeping import DISK_SECONDS, URGENT_SECONDS

from web4lora_gateway.collection import Collected, Collector
from web4lora_gateway.database import RUNS
from web4lora_gateway.deletion import RunDeleter
from web4lora_gateway.records import RunRecord
from web4lora_gateway.runs import RunBook
from web4lora_gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_APPLY_SECONDS = 3600.0
_PAGE = 200


class Retention:
    """Applies the retention settings every hour, and as soon as a disk is nearly full.

    Args:
        book: The runs.
        deleter: Deletes them.
        collector: Deletes artifacts.
        settings: What is kept.
    """

    def __init__(
        self, book: RunBook, deleter: RunDeleter, collector: Collector, settings: GatewaySettings
    ) -> None:
        self._book = book
        self._deleter = deleter
        self._collector = collector
        self._settings = settings
        self._applied_at = self._urgent_at = float("-inf")
        self.warnings: list[str] = []
        """Lines about disks that are nearly full."""

    async def apply_for_ever(self) -> None:
        """Go on until cancelled, whatever comes between."""
        while True:
            try:
                await self.look()
            except Unavailable as error:
                log.warning("what is no longer kept goes later: %s", error.message)
            except Exception:
                log.exception("what is no longer kept goes later")
            await asyncio.sleep(DISK_SECONDS)

    async def look(self) -> None:
        """Apply the settings when it is time, or when there is no more room; warn while there is none."""
        warnings = await asyncio.to_thread(self._disk_warnings)
        for line in warnings:
            if line not in self.warnings:
                log.warning("%s", line)
        self.warnings = warnings
        now = time.monotonic()
        urgent = bool(warnings) and now - self._urgent_at > URGENT_SECONDS
        if urgent or now - self._applied_at > _APPLY_SECONDS:
            self._applied_at = now
            if urgent:
                self._urgent_at = now
            await self.apply()

    async def apply(self) -> None:
        """Delete what is no longer kept: runs first, then what only they needed."""
        keep = self._settings
        for run_id in await self.surplus_runs():
            try:
                await self._deleter.delete(run_id)
            except (NotFound, FailedPrecondition) as error:  # deleted or kept meanwhile
                log.info("%s", error.message)
        freed = 0
        if keep.keep_artifacts_days:
            freed += await self._collect(unused_days=keep.keep_artifacts_days)
        if keep.keep_artifacts_gb:
            freed += await self._collect(room_bytes=int(keep.keep_artifacts_gb * GB))
        async for upload in self._collector.collect_uploads():
            freed += upload.size_bytes
        if freed:
            log.info("%.1f GB of the store were freed", freed / GB)

    async def _collect(self, *, unused_days: float = 0.0, room_bytes: int | None = None) -> int:
        freed = 0
        async for found in self._collector.collect(unused_days=unused_days, room_bytes=room_bytes):
            if isinstance(found, Collected) and not found.kept_for:
                freed += found.ref.size_bytes
        return freed

    async def surplus_runs(self) -> list[str]:
        """Return the ended runs that are too many or too old."""
        keep = self._settings
        if not (keep.keep_runs or keep.keep_runs_days or keep.keep_labels):
            return []
        surplus, number, token = [], 0, ""
        while True:
            runs, token = await self._book.page(_PAGE, token, [RUNS.c.ended])
            for run in runs:
                if not isinstance(run, RunRecord) or run.kept:
                    continue
                if rule := keep.label_rule(run.labels):  # these don't count among the others either
                    if rule.over(run.ended_at, time.time()):
                        surplus.append(run.id)
                    continue
                number += 1
                too_old = (
                    keep.keep_runs_days and time.time() - run.ended_at > keep.keep_runs_days * DAY_SECONDS
                )
                if too_old or (keep.keep_runs and number > keep.keep_runs):
                    surplus.append(run.id)
            if not token:
                return surplus

    def _disk_warnings(self) -> list[str]:
        found = {}
        for place in self._places():
            try:
                disk = place.stat().st_dev
            except FileNotFoundError:
                continue
            if disk not in found:
                found[disk] = disk_warning(place, self._settings)
        return [line for line in found.values() if line]

    def _places(self) -> Iterator[Path]:
        yield self._settings.home
        parts = urlsplit(self._settings.store)
        if parts.scheme == "file":
            yield Path(url2pathname(parts.path))
        if self._settings.outputs_dir is not None:
            yield self._settings.outputs_dir
