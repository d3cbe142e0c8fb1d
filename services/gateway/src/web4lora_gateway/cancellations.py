"""Cancels that couldn't be delivered: a worker that is back must not go on with a cancelled run's job."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging

import sqlalchemy as sa
from web4lora_chassis.errors import Unavailable, Web4Error

from web4lora_gateway.database import CANCELLATIONS, Waiting, call, upsert
from web4lora_gateway.job_following import cancel_job
from web4lora_gateway.workers import Worker, Workers

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0


class Cancellations:
    """Keeps undelivered cancels in the database and delivers them once their worker is back."""

    def __init__(self, engine: sa.Engine, workers: Workers) -> None:
        self._engine = engine
        self._workers = workers

    async def add(self, worker: str, request_id: str, job_id: str, waiting: Waiting | None = None) -> None:
        """Keep a cancel; the same one twice is no error. `waiting` is told why the database is waited for."""
        row = {"worker": worker, "request_id": request_id, "job_id": job_id}
        await call(self._engine, lambda connection: upsert(connection, CANCELLATIONS, row), waiting)

    async def deliver(self) -> None:
        """Deliver for ever what there is to deliver. Two gateways may cancel the same job: once is enough."""
        while True:
            rows = await call(
                self._engine, lambda connection: list(connection.execute(sa.select(CANCELLATIONS))), _log
            )
            for row in rows:
                worker = self._workers.by_id.get(row.worker)
                if worker is None:  # a trainer that is no longer among ours
                    continue
                with contextlib.suppress(Unavailable):
                    await self.deliver_one(worker, row.request_id, row.job_id)
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def deliver_one(self, worker: Worker, request_id: str, job_id: str) -> None:
        """Deliver a cancel that is kept, and forget it.

        Raises:
            Unavailable: The worker is out of reach; the cancel is still kept.
        """
        try:
            await cancel_job(worker, request_id, job_id)
        except Unavailable:
            raise
        except Web4Error as error:
            log.warning("the job of %s was not cancelled: %s", request_id, error.message)
        done = sa.delete(CANCELLATIONS).where(CANCELLATIONS.c.request_id == request_id)
        await call(self._engine, functools.partial(_execute, statement=done), _log)


async def _log(line: str) -> None:
    log.warning("cancels are not delivered: %s", line)


def _execute(connection: sa.Connection, statement: sa.Executable) -> None:
    connection.execute(statement)
