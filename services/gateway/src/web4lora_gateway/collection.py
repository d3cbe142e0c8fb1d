"""Frees the store of what nothing needs, beside work in progress: marked, looked at again, deleted."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.artifacts.backend import Stored
from web4lora_chassis.artifacts.index import Indexed, ManifestIndex
from web4lora_chassis.artifacts.store import CutOff
from web4lora_chassis.keeping import HOUR_SECONDS, Keeping

from web4lora_gateway.database import RESULTS, call
from web4lora_gateway.needs import Needs, NeedsFinder
from web4lora_gateway.pools import BYTES, STORE

log = logging.getLogger(__name__)

_AT_ONCE = 20


@dataclass(frozen=True)
class Collected:
    """An artifact that was looked at, and what it is kept for; for nothing: it went, or would go."""

    ref: ArtifactRef
    kept_for: tuple[str, ...]


@dataclass(frozen=True)
class Collector:
    """Deletes artifacts that nothing needs, and what uploads left that were cut off.

    Attributes:
        engine: The database.
        store: The artifacts.
        index: What is in the store.
        needs: Knows what is needed.
        keep: How long new ones are left alone.
    """

    engine: sa.Engine
    store: ArtifactStore
    index: ManifestIndex
    needs: NeedsFinder
    keep: Keeping

    async def collect(
        self,
        *,
        dry_run: bool = False,
        keep_runs: int | None = None,
        unused_days: float = 0.0,
        room_bytes: int | None = None,
    ) -> AsyncIterator[Collected | CutOff]:
        """Yield every artifact, and what cut-off uploads left, once it was deleted or is kept.

        Args:
            dry_run: Delete nothing.
            keep_runs: Of the runs that have ended and are not kept, only the newest this many count.
                None: all.
            unused_days: Those stored since then stay, whoever needs them.
            room_bytes: Delete, the oldest first, only while the store has more; None: all that nothing needs.

        Raises:
            Unavailable: The store or the deployer is out of reach.
        """
        # What is needed is asked for behind what there is: what is stored meanwhile is not in the list.
        rows = await STORE.run(self.index.newest)
        needs = await self.needs.all(keep_runs)
        new_hours = max(self.keep.keep_new_hours, unused_days * 24)
        kept = needs.kept_for(rows, new_hours)
        for row in rows:
            if row.ref.digest in kept:
                yield Collected(row.ref, tuple(kept[row.ref.digest]))
        unneeded = [row for row in reversed(rows) if row.ref.digest not in kept]
        if room_bytes is not None:
            unneeded = _beyond(unneeded, sum(row.ref.size_bytes for row in rows) - room_bytes)
        for start in range(0, len(unneeded), _AT_ONCE):
            some = unneeded[start : start + _AT_ONCE]
            spared = {} if dry_run else await self._delete(some, rows, new_hours)
            for row in some:
                yield Collected(row.ref, tuple(spared.get(row.ref.digest, ())))
        async for upload in self.collect_uploads(dry_run=dry_run):
            yield upload

    async def collect_uploads(self, *, dry_run: bool = False) -> AsyncIterator[CutOff]:
        """Yield what uploads left that were cut off, after it was deleted.

        Raises:
            Unavailable: The store is out of reach.
        """
        before = time.time() - self.keep.keep_new_hours * HOUR_SECONDS
        for upload in await STORE.run(self.store.cut_off, before):
            if not dry_run:
                await BYTES.run(self.store.free, upload)
            yield upload

    async def _delete(
        self, rows: list[Indexed], everything: list[Indexed], new_hours: float
    ) -> dict[str, list[str]]:
        """Delete artifacts, but those that something needs by now: what for is returned, by digest."""
        digests = [row.ref.digest for row in rows]
        holds = self.needs.holds
        await holds.doom(digests)
        try:
            spared = await self._needed_by_now(rows, everything, new_hours)
            for row in rows:
                if row.ref.digest not in spared:
                    await holds.doom(digests)
                    await BYTES.run(self.store.delete, row.ref)
                    log.info("%s was deleted: nothing needs it", row.ref)
            await self._forget([digest for digest in digests if digest not in spared])
        finally:
            await holds.spare(digests)
        return spared

    async def _needed_by_now(
        self, rows: list[Indexed], everything: list[Indexed], new_hours: float
    ) -> dict[str, list[str]]:
        needs: Needs = await self.needs.of_work()
        kept = needs.kept_for(everything, new_hours)
        spared = {row.ref.digest: kept[row.ref.digest] for row in rows if row.ref.digest in kept}
        for row in rows:
            found = await STORE.run(self._stored, row.ref)
            if row.stored not in found:
                spared.setdefault(row.ref.digest, ["stored again just now, or gone"])
        return spared

    def _stored(self, ref: ArtifactRef) -> list[Stored]:
        return list(self.store.manifests(ref.kind, ref.name))

    async def _forget(self, digests: list[str]) -> None:
        """Forget the results of stages that name what is gone: none of them can be taken over."""

        def write(connection: sa.Connection) -> None:
            text = sa.cast(RESULTS.c.document, sa.Text)
            for digest in digests:
                connection.execute(sa.delete(RESULTS).where(text.contains(digest, autoescape=True)))

        if digests:
            await call(self.engine, write)


def _beyond(rows: Iterable[Indexed], too_many_bytes: int) -> list[Indexed]:
    """Return as many artifacts, in order, as have so many bytes together."""
    going = []
    for row in rows:
        if too_many_bytes <= 0:
            break
        too_many_bytes -= row.ref.size_bytes
        going.append(row)
    return going
