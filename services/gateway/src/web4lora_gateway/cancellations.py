"""Cancels that couldn't be delivered: a worker that is back must not go on with a cancelled run's job."""

from __future__ import annotations

import asyncio
import functools
import logging

import sqlalchemy as sa
from web4lora_chassis.errors import Unavailable, Web4Error

from web4lora_gateway.database import CANCELLATIONS, call
from web4lora_gateway.follow import cancel_job
from web4lora_gateway.workers import Workers

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0


class Cancellations:
    """Keeps undelivered cancels in the database and delivers them once their worker is back."""

    def __init__(self, engine: sa.Engine, workers: Workers) -> None:
        self._engine = engine
        self._workers = workers

    async def add(self, worker: str, request_id: str, job_id: str) -> None:
        """Keep a cancel; the same one twice is no error."""
        row = {"worker": worker, "request_id": request_id, "job_id": job_id}

        def write(connection: sa.Connection) -> None:
            connection.execute(sa.delete(CANCELLATIONS).where(CANCELLATIONS.c.request_id == request_id))
            connection.execute(sa.insert(CANCELLATIONS).values(row))

        await call(self._engine, write)

    async def deliver(self) -> None:
        """Deliver for ever what there is to deliver."""
        while True:
            rows = await call(
                self._engine, lambda connection: list(connection.execute(sa.select(CANCELLATIONS)))
            )
            for row in rows:
                try:
                    await cancel_job(self._workers.by_name[row.worker], row.request_id, row.job_id)
                except Unavailable:
                    continue
                except Web4Error as error:
                    log.warning("the job of %s was not cancelled: %s", row.request_id, error.message)
                done = sa.delete(CANCELLATIONS).where(CANCELLATIONS.c.request_id == row.request_id)
                await call(self._engine, functools.partial(_execute, statement=done))
            await asyncio.sleep(_INTERVAL_SECONDS)


def _execute(connection: sa.Connection, statement: sa.Executable) -> None:
    connection.execute(statement)
