"""One list of principals for all gateways on one PostgreSQL, with a copy in the home of each."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from functools import partial

import sqlalchemy as sa
from web4lora_chassis.errors import AlreadyExists, Unavailable, Web4Error
from web4lora_chassis.principals import Principal, Principals, Scope

from web4lora_gateway.database import PRINCIPALS, call, shared

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class People:
    """Keeps the principals of a home and those in the database the same.

    A change is in the database first. A gateway that can't reach it goes on with what its home holds.

    Args:
        engine: The database. SQLite has one gateway, whose home is enough.
        principals: Of this gateway's home; changes to them are made through this one.
    """

    def __init__(self, engine: sa.Engine, principals: Principals) -> None:
        self._engine = engine
        self._principals = principals
        if shared(engine):
            principals.keep = self._keep

    async def join(self) -> None:
        """Add those of this home to the list."""
        for principal in self._principals.all() if shared(self._engine) else ():
            await call(self._engine, partial(_join, principal=principal))

    async def keep_up(self) -> None:
        """Look for ever after what other gateways change."""
        while shared(self._engine):
            try:
                await self.look()
            except (Web4Error, sa.exc.OperationalError) as error:
                log.warning("people that other gateways know are looked for again: %s", error)
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Take over what other gateways changed."""
        await asyncio.to_thread(self._principals.take, self._all)

    def _all(self) -> list[Principal]:
        with self._engine.begin() as connection:
            rows = connection.execute(sa.select(PRINCIPALS.c.document)).scalars().all()
        return [Principal(**{**document, "scope": Scope(document["scope"])}) for document in rows]

    def _keep(self, principal: Principal) -> None:
        """Write a principal into the list.

        Raises:
            AlreadyExists: Another gateway gave the name to another one.
            Unavailable: The database is out of reach.
        """
        try:
            with self._engine.begin() as connection:
                _write(connection, principal)
        except sa.exc.IntegrityError as error:
            raise AlreadyExists(
                f"There is or was a principal {principal.name}.", fix="Choose another name."
            ) from error
        except sa.exc.OperationalError as error:
            raise Unavailable(
                f"The database is out of reach: {error.orig}", fix="Try again once it is back."
            ) from error


def _write(connection: sa.Connection, principal: Principal, name: str = "") -> None:
    document = asdict(principal)
    changed = sa.update(PRINCIPALS).where(PRINCIPALS.c.id == principal.id).values(document=document)
    if not connection.execute(changed).rowcount:
        row = {"id": principal.id, "name": name or principal.name, "document": document}
        connection.execute(sa.insert(PRINCIPALS).values(row))


def _join(connection: sa.Connection, principal: Principal) -> None:
    """Add a principal that another version knew in this home alone, unless it is in the list."""
    known = connection.execute(
        sa.select(PRINCIPALS.c.id, PRINCIPALS.c.name).where(
            sa.or_(PRINCIPALS.c.id == principal.id, PRINCIPALS.c.name == principal.name)
        )
    ).all()
    if any(row.id == principal.id for row in known):
        return
    if known:
        log.warning("two principals are called %s: gateways had given the name each", principal.name)
    _write(connection, principal, f"{principal.name} {principal.id}" if known else "")
