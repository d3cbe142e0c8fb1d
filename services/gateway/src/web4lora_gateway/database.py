"""The gateway's tables, in the same database as the workflow engine's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from web4lora_chassis.errors import InvalidInput, ResourceExhausted, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_SECONDS = 1.0
_METADATA = sa.MetaData()

RUNS = sa.Table(
    "web4lora_runs",
    _METADATA,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("request_id", sa.String(200), nullable=False, unique=True),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("ended", sa.Boolean, nullable=False, index=True),
    sa.Column("document", sa.JSON, nullable=False),
)
"""A run each; `document` is the RunRecord."""

RESULTS = sa.Table(
    "web4lora_stage_results",
    _METADATA,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("run_id", sa.String(40), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("document", sa.JSON, nullable=False),
)
"""What stages came to, by the digest of what went in; `document` is the StageResult."""

CANCELLATIONS = sa.Table(
    "web4lora_cancellations",
    _METADATA,
    sa.Column("request_id", sa.String(200), primary_key=True),
    sa.Column("worker", sa.String(16), nullable=False),
    sa.Column("job_id", sa.String(80), nullable=False),
)
"""Jobs to be cancelled once their worker is back."""


def open_database(url: str) -> sa.Engine:
    """Open the database and make the gateway's tables where they are missing.

    Args:
        url: sqlite:///path or postgresql://…

    Raises:
        InvalidInput: The address is of no known form.
        Unavailable: The database is out of reach.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise _bad_url() from error
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    elif kind != "sqlite":
        raise _bad_url()
    if kind == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, pool_pre_ping=True)
    if kind == "sqlite":
        sa.event.listen(engine, "connect", _patient)
    try:
        _METADATA.create_all(engine)
    except sa.exc.OperationalError as error:
        raise Unavailable(
            f"The database {parsed.render_as_string(hide_password=True)} is out of reach: {error.orig}",
            fix="Start it, or correct WEB4LORA_DATABASE.",
        ) from error
    return engine


async def call(engine: sa.Engine, function: Callable[[sa.Connection], T]) -> T:
    """Do something in a transaction, off the event loop. A server that is away is waited for.

    Args:
        engine: The database.
        function: What to do; it may be done again when the connection breaks.
    """

    def work() -> T:
        with engine.begin() as connection:
            return function(connection)

    while True:
        try:
            return await asyncio.to_thread(work)
        except sa.exc.OperationalError as error:
            if engine.dialect.name == "sqlite":  # a full disk, not a server that may come back
                raise ResourceExhausted(f"The gateway's database can't be used: {error.orig}.") from error
            log.warning("the database is out of reach: %s", error.orig)
        await asyncio.sleep(_RETRY_SECONDS)


def _patient(connection: Any, _record: object) -> None:
    # The workflow engine writes to the same file: wait for it instead of failing.
    connection.execute("PRAGMA busy_timeout=30000")


def _bad_url() -> InvalidInput:
    return InvalidInput(
        "WEB4LORA_DATABASE is not the address of a database.",
        fix="Use postgresql://user:password@host/name, or leave it empty for SQLite.",
    )
