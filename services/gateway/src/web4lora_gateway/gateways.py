"""The gateways that work with one database: each says that it lives, and one that is gone is struck off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from pathlib import Path

import sqlalchemy as sa

from web4lora_gateway.database import GATEWAYS, TROUBLE, Waiting, call, shared, upsert

log = logging.getLogger(__name__)

_LEAVE_SECONDS = 3.0
BEAT_SECONDS = 2.0
LEASE_SECONDS = 10.0
"""One that was not heard of for so long is gone. If it was but stopped, it finds its runs taken over."""


def gateway_id(state_dir: Path) -> str:
    """Return the name of the gateway with this state folder, the same after every restart."""
    place = state_dir / "gateway-id"
    if not place.exists():
        part = place.with_suffix(".part")
        part.write_text(f"gateway-{secrets.token_hex(8)}\n", encoding="utf-8")
        part.replace(place)
    return place.read_text(encoding="utf-8").strip()


class Gateways:
    """Knows which gateways live.

    Each raises its number in the database every two seconds. Whether a number still grows is seen by one's
    own steady clock, so that clocks which differ or jump bury nobody. With SQLite there is one gateway.

    Args:
        engine: The database.
        own: The name of this gateway.
    """

    def __init__(self, engine: sa.Engine, own: str) -> None:
        self.own = own
        self._engine = engine
        self._session = secrets.token_hex(8)
        self._beat = 0
        self._seen: dict[str, tuple[str, int, float]] = {}

    async def beat(self, waiting: Waiting | None = None) -> None:
        """Say that this gateway lives."""
        self._beat += 1
        row = {"id": self.own, "session": self._session, "beat": self._beat}
        await call(self._engine, lambda connection: upsert(connection, GATEWAYS, row), waiting)

    async def beat_for_ever(self, waiting: Waiting) -> None:
        """Say every two seconds that this gateway lives, where others may ask.

        It also finds out when a database is well again that the workflow engine waits for.

        Args:
            waiting: Told why the database is waited for.
        """
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if shared(self._engine) or TROUBLE.text:
                await self.beat(waiting)
                TROUBLE.text = ""

    async def leave(self) -> None:
        """Be counted out at once: others take its runs over. A server that is away finds out."""
        if not shared(self._engine):
            return
        statement = sa.delete(GATEWAYS).where(GATEWAYS.c.id == self.own, GATEWAYS.c.session == self._session)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                await call(self._engine, lambda connection: connection.execute(statement))

    async def live(self) -> set[str]:
        """Return the names of the gateways that live. One that is gone is struck off."""
        if not shared(self._engine):
            return {self.own}
        rows = await call(self._engine, lambda connection: list(connection.execute(sa.select(GATEWAYS))))
        now = time.monotonic()
        for row in rows:
            before = self._seen.get(row.id)
            if before is None or before[:2] != (row.session, row.beat):
                self._seen[row.id] = (row.session, row.beat, now)
        names = {row.id for row in rows}
        gone = {name for name in names if now - self._seen[name][2] > LEASE_SECONDS} - {self.own}
        for name in gone:
            log.warning(
                "the gateway %s was not heard of for %g s: its runs are taken over", name, LEASE_SECONDS
            )
            await self._strike_off(name)
        return (names - gone) | {self.own}

    async def _strike_off(self, name: str) -> None:
        session, beat, _ = self._seen[name]
        statement = sa.delete(GATEWAYS).where(
            GATEWAYS.c.id == name, GATEWAYS.c.session == session, GATEWAYS.c.beat == beat
        )
        await call(self._engine, lambda connection: connection.execute(statement))
