"""Results of stages by key: the same inputs never run twice."""

from __future__ import annotations

import time

import sqlalchemy as sa

from web4lora_gateway.database import RESULTS, Waiting, call, upsert
from web4lora_gateway.holds import Holds
from web4lora_gateway.records import StageResult


class StageResults:
    """Keeps what succeeded stages came to.

    Attributes:
        holds: What runs are about to take over of it.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.holds = Holds(engine)

    async def find(self, key: str, waiting: Waiting | None = None) -> StageResult | None:
        """Return the newest result for a key, or None; `waiting` is told why the database is waited for."""
        query = sa.select(RESULTS.c.document).where(RESULTS.c.key == key)
        document = await call(self._engine, lambda connection: connection.execute(query).scalar(), waiting)
        return StageResult.from_json(document) if document else None

    async def save(self, stage: str, made: StageResult, waiting: Waiting | None = None) -> None:
        """Keep a result in place of an earlier one with the same key.

        Args:
            stage: The stage's name.
            made: The result.
            waiting: Told why the database is waited for.
        """
        row = {
            "key": made.key,
            "stage": stage,
            "run_id": made.run_id,
            "created_at": time.time(),
            "document": made.to_json(),
        }
        await call(self._engine, lambda connection: upsert(connection, RESULTS, row), waiting)
