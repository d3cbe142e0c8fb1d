"""Every run the gateway knows: on disk before anyone is told, watched by those who follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from web4lora_chassis.errors import NotFound
from web4lora_chassis.jobs import Progress

from web4lora_gateway.database import RUNS, call
from web4lora_gateway.records import RunRecord

_WATCH_INTERVAL_SECONDS = 0.2


class RunBook:
    """Keeps runs in the database, and those that have not ended in memory too.

    All changes come from one event loop. Progress lives in memory alone: it is worth no write to the disk,
    and after a restart the worker tells it anew.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._live: dict[str, RunRecord] = {}
        self._cancels: dict[str, asyncio.Event] = {}
        self._lock = asyncio.Lock()
        self._news = asyncio.Condition()

    async def start(self) -> list[RunRecord]:
        """Load the runs that have not ended, and return them, oldest first."""
        query = sa.select(RUNS.c.document).where(~RUNS.c.ended).order_by(RUNS.c.created_at)
        records = await self._read(query)
        for record in records:
            self._live[record.id] = record
            if record.state == "CANCELLING":
                self.cancelled(record.id).set()
        return records

    async def create(
        self, make: Callable[[int], RunRecord], prefix: str, request_id: str
    ) -> tuple[RunRecord, bool]:
        """Add a run, unless this request has made one.

        Args:
            make: Makes the record from the lowest number its id may take.
            prefix: Beginning of the ids that the number must differ from: "run_<date>_".
            request_id: The caller's key.

        Returns:
            The run, durable, and whether it is new.
        """
        async with self._lock:
            before = await self.by_request(request_id)
            if before is not None:
                return before, False
            query = sa.select(RUNS.c.id).where(RUNS.c.id.startswith(prefix, autoescape=True))
            numbers = [int(run_id.removeprefix(prefix)) for run_id in await self._column(query)]
            record = await asyncio.to_thread(make, max(numbers, default=0) + 1)
            row = {
                "id": record.id,
                "request_id": record.request_id,
                "created_at": record.created_at,
                "ended": False,
                "document": record.to_json(),
            }
            await self._write(sa.insert(RUNS).values(row))
            self._live[record.id] = record
        return record, True

    async def get(self, run_id: str) -> RunRecord:
        """Return a run as it is now; "latest" names the newest one.

        Raises:
            NotFound: No such run.
        """
        if run_id == "latest":
            newest = await self._column(
                sa.select(RUNS.c.id).order_by(RUNS.c.created_at.desc(), RUNS.c.id.desc()).limit(1)
            )
            if not newest:
                raise NotFound("There is no run yet.", fix="`web4lora run PIPELINE.yaml` makes one.")
            run_id = newest[0]
        if run_id in self._live:
            return self._live[run_id]
        found = await self._read(sa.select(RUNS.c.document).where(RUNS.c.id == run_id))
        if not found:
            raise NotFound(
                f"There is no run {run_id!r}.",
                fix="`web4lora runs list` shows all.",
                metadata={"run": run_id},
            )
        return found[0]

    async def by_request(self, request_id: str) -> RunRecord | None:
        """Return the run that a request made, or None."""
        ids = await self._column(sa.select(RUNS.c.id).where(RUNS.c.request_id == request_id))
        return await self.get(ids[0]) if ids else None

    async def ids(self) -> list[str]:
        """Return the ids of all runs, newest first."""
        return await self._column(sa.select(RUNS.c.id).order_by(RUNS.c.created_at.desc(), RUNS.c.id.desc()))

    async def change(self, run_id: str, change: Callable[[RunRecord], RunRecord]) -> RunRecord:
        """Change a run, on disk first, and wake who watches.

        Args:
            run_id: The run.
            change: Makes the new record from the current one; returning that very one changes nothing.
        """
        async with self._lock:
            before = await self.get(run_id)
            record = change(before)
            if record is before:
                return before
            await self._write(
                sa.update(RUNS)
                .where(RUNS.c.id == run_id)
                .values(ended=record.state.terminal, document=record.to_json())
            )
            live = self._live.get(run_id, record)
            if live.revision >= record.revision:  # progress was told while this was written
                record = replace(record, revision=live.revision + 1)
            if record.state.terminal:
                self._live.pop(run_id, None)
                self._cancels.pop(run_id, None)
            else:
                self._live[run_id] = record
        async with self._news:
            self._news.notify_all()
        return record

    async def progress(self, run_id: str, stage: str, progress: Progress) -> None:
        """Tell how far a stage is, in memory alone."""
        record = self._live.get(run_id)
        if record is None or record.stage(stage).progress == progress:
            return
        self._live[run_id] = record.with_stage(stage, progress=progress)
        async with self._news:
            self._news.notify_all()

    def cancelled(self, run_id: str) -> asyncio.Event:
        """Return the event that is set once a run's cancel was asked for."""
        return self._cancels.setdefault(run_id, asyncio.Event())

    async def watch(self, run_id: str) -> AsyncIterator[RunRecord]:
        """Yield a run as it is now, then after changes, at most some five a second, and end with it.

        Raises:
            NotFound: No such run.
        """
        record = await self.get(run_id)
        yield record
        while not record.state.terminal:
            await asyncio.sleep(_WATCH_INTERVAL_SECONDS)
            seen = record.revision
            async with self._news:
                while (live := self._live.get(record.id)) is not None and live.revision == seen:
                    await self._news.wait()
            record = live or await self.get(record.id)
            yield record

    async def _read(self, query: sa.Select[Any]) -> list[RunRecord]:
        return [RunRecord.from_json(document) for document in await self._column(query)]

    async def _column(self, query: sa.Select[Any]) -> list[Any]:
        return await call(self._engine, lambda connection: list(connection.execute(query).scalars()))

    async def _write(self, statement: sa.Executable) -> None:
        await call(self._engine, lambda connection: connection.execute(statement))
