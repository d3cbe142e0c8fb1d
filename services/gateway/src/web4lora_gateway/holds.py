"""Between runs that take earlier results over and the collection of garbage: neither misses the other.

A run that is about to take a result over holds its artifacts first and then looks whether they are being
deleted. Who deletes says so first and then looks whether they are held. So at least one of them sees the
other and gives way, in whichever gateways they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable

import sqlalchemy as sa

from web4lora_gateway.database import DOOMED, HOLDS, RUNS, Waiting, call, upsert

_DOOMED_SECONDS = 60.0
_LOOK_SECONDS = 0.1


class Holds:
    """Keeps in the database which artifacts are held by runs, and which are being deleted."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    async def hold(self, run_id: str, digests: Collection[str], waiting: Waiting | None = None) -> bool:
        """Hold artifacts until a run has ended; return False when one of them is being deleted.

        Args:
            run_id: The run.
            digests: The artifacts.
            waiting: Told why the database is waited for.
        """

        def write(connection: sa.Connection) -> None:
            for digest in sorted(digests):
                upsert(connection, HOLDS, {"run_id": run_id, "digest": digest})

        await call(self._engine, write, waiting)
        return not (await self._doomed(waiting)).intersection(digests)

    async def settled(self, waiting: Waiting | None = None) -> None:
        """Wait until what is being deleted now is gone: a job must not store anew what is half deleted."""
        before = await self._doomed(waiting)
        while before & await self._doomed(waiting):
            await asyncio.sleep(_LOOK_SECONDS)

    async def held(self) -> dict[str, list[str]]:
        """Return the artifacts that runs hold which have not ended, with those runs; others let go."""

        def read(connection: sa.Connection) -> list[tuple[str, str]]:
            unended = sa.select(RUNS.c.id).where(~RUNS.c.ended)
            connection.execute(sa.delete(HOLDS).where(HOLDS.c.run_id.not_in(unended)))
            return [(row.digest, row.run_id) for row in connection.execute(sa.select(HOLDS))]

        runs: dict[str, list[str]] = {}
        for digest, run_id in await call(self._engine, read):
            runs.setdefault(digest, []).append(run_id)
        return runs

    async def doom(self, digests: Iterable[str]) -> None:
        """Say that artifacts are about to be deleted, for a minute unless it is said again."""
        until = time.time() + _DOOMED_SECONDS

        def write(connection: sa.Connection) -> None:
            for digest in sorted(digests):
                upsert(connection, DOOMED, {"digest": digest, "until": until})

        await call(self._engine, write)

    async def spare(self, digests: Iterable[str]) -> None:
        """Say that artifacts are deleted now, or are not going to be."""
        statement = sa.delete(DOOMED).where(DOOMED.c.digest.in_(list(digests)))
        await call(self._engine, lambda connection: connection.execute(statement))

    async def _doomed(self, waiting: Waiting | None) -> set[str]:
        query = sa.select(DOOMED.c.digest).where(DOOMED.c.until > time.time())
        return set(
            await call(self._engine, lambda connection: connection.execute(query).scalars().all(), waiting)
        )
