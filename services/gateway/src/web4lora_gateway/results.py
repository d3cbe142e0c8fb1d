"""Results of stages by key: the same inputs never run twice."""

from __future__ import annotations

import time
from dataclasses import asdict

import sqlalchemy as sa

from web4lora_gateway.database import RESULTS, call
from web4lora_gateway.records import StageResult


class StageResults:
    """Keeps what succeeded stages came to."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    async def find(self, key: str) -> StageResult | None:
        """Return the newest result for a key, or None."""
        query = sa.select(RESULTS.c.document).where(RESULTS.c.key == key)
        document = await call(self._engine, lambda connection: connection.execute(query).scalar())
        return StageResult(**document) if document else None

    async def save(self, stage: str, made: StageResult) -> None:
        """Keep a result in place of an earlier one with the same key."""
        row = {
            "key": made.key,
            "stage": stage,
            "run_id": made.run_id,
            "created_at": time.time(),
            "document": asdict(made),
        }

        def write(connection: sa.Connection) -> None:
            connection.execute(sa.delete(RESULTS).where(RESULTS.c.key == made.key))
            connection.execute(sa.insert(RESULTS).values(row))

        await call(self._engine, write)
