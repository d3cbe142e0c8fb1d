"""The gateway's tables, in the same database as the workflow engine's, and how they are waited for."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from web4lora_chassis.errors import InvalidInput, ResourceExhausted, Unavailable

from web4lora_gateway.pools import DATABASE

log = logging.getLogger(__name__)

T = TypeVar("T")
Waiting = Callable[[str], Awaitable[None]]
"""Given a line on why the database is waited for, each time it is tried in vain."""

_RETRY_SECONDS = 1.0
_CONNECT_SECONDS = 10
_NOT_READY = "the database system is "
"""What PostgreSQL says while it starts, recovers or shuts down."""
_SCHEMA_LOCK = 0x77656234
"""Number of PostgreSQL's advisory lock under which tables are made: two gateways may start at once."""
_FILE_ERRORS = frozenset(
    (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY,
     sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
)  # fmt: skip
"""What SQLite says of a disk or a lock, and not of a statement: it passes once there is room again."""
_PRIMARY_CODE = 0xFF
_METADATA = sa.MetaData()

RUNS = sa.Table(
    "web4lora_runs",
    _METADATA,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("request_id", sa.String(200), nullable=False, unique=True),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("ended", sa.Boolean, nullable=False, index=True),
    sa.Column("document", sa.JSON, nullable=False),
    sa.Column("version", sa.Integer, nullable=False, server_default="0"),
    sa.Column("revision", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("state", sa.String(16), nullable=False, server_default="", index=True),
    sa.Column("name", sa.String(200), nullable=False, server_default="", index=True),
    sa.Column("owner", sa.String(200), nullable=False, server_default="", index=True),
    sa.Column("labels", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("gateway", sa.String(80), nullable=False, server_default="", index=True),
    sa.Column("progress", sa.JSON, nullable=True),
)
"""A run each.

`document` is the RunRecord and the truth; `state`, `name`, `owner` and `labels` are copies of its fields,
to find runs by. `version` grows with every change of the document, which is made only to the version that
was read. `revision` grows with that and with every progress. `gateway` is the one that carries the run on.
`progress` is how far its stage is, as that gateway wrote it last.
"""

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

DELETED = sa.Table(
    "web4lora_deleted_runs",
    _METADATA,
    sa.Column("id", sa.String(40), primary_key=True),
)
"""Ids of runs that were deleted, which no other run may take."""

HOLDS = sa.Table(
    "web4lora_holds",
    _METADATA,
    sa.Column("run_id", sa.String(40), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),
)
"""Artifacts that a run that has not ended is about to take over from an earlier one."""

DOOMED = sa.Table(
    "web4lora_doomed",
    _METADATA,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("until", sa.Float, nullable=False),
)
"""Artifacts that are being deleted; one that outlives `until`, in seconds since 1970, is left of a crash."""

PLACES = sa.Table(
    "web4lora_places",
    _METADATA,
    sa.Column("work", sa.String(200), primary_key=True),
    sa.Column("run_id", sa.String(40), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("lane", sa.String(16), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("entered_at", sa.Float, nullable=False),
    sa.Column("began_at", sa.Float, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(16), nullable=False),
    sa.Column("turn", sa.String(40), nullable=True, unique=True),
    sa.Column("done", sa.Boolean, nullable=False, index=True),
)
"""Places in the lines before the workers, kept until their run has ended; see `Place`.

`turn` names the lane of the worker that does the work now. Being unique, only one can have it, over all
gateways.
"""

TRAINERS = sa.Table(
    "web4lora_trainers",
    _METADATA,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("mode", sa.String(16), nullable=False),
)
"""What people set of trainers: that one takes no work."""

PRINCIPALS = sa.Table(
    "web4lora_principals",
    _METADATA,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(80), nullable=False, unique=True),
    sa.Column("document", sa.JSON, nullable=False),
)
"""Who may call, where several gateways work with the database.

`document` is the Principal; `name` only sees to it that two gateways don't give one name at the same time.
"""

GATEWAYS = sa.Table(
    "web4lora_gateways",
    _METADATA,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("session", sa.String(32), nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
)
"""The gateways at work; `beat` grows every few seconds, as long as that process lives."""


def open_database(url: str) -> sa.Engine:
    """Open the database, make the gateway's tables where they are missing, and bring older ones up to date.

    A server that hangs or is not ready yet is waited for as long as it takes, and the log says so.

    Args:
        url: sqlite:///path or postgresql://…

    Raises:
        InvalidInput: The address is of no known form.
        Unavailable: The database is out of reach: nothing listens there, or it refuses us.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise _bad_url() from error
    kind = parsed.get_backend_name()
    limits: dict[str, int] = {}
    if kind == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        if "connect_timeout" not in parsed.query:
            limits["connect_timeout"] = _CONNECT_SECONDS
    elif kind != "sqlite":
        raise _bad_url()
    if kind == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=limits)
    if kind == "sqlite":
        sa.event.listen(engine, "connect", _patient)
    while True:
        try:
            with engine.begin() as connection:
                _make_tables(connection)
            return engine
        except sa.exc.OperationalError as error:
            if not _hangs(error):
                place = parsed.render_as_string(hide_password=True)
                raise Unavailable(
                    f"The database {place} is out of reach: {error.orig}",
                    fix="Start it, or correct WEB4LORA_DATABASE.",
                ) from error
            log.warning("the database is waited for: %s", error.orig)
        time.sleep(_RETRY_SECONDS)


def _hangs(error: sa.exc.OperationalError) -> bool:
    """Tell whether a server is there that does not answer, or says that it is not ready."""
    return isinstance(error.orig, psycopg.errors.ConnectionTimeout) or _NOT_READY in str(error.orig)


def shared(engine: sa.Engine) -> bool:
    """Tell whether other gateways may work with this database too."""
    return engine.dialect.name == "postgresql"


async def call(
    engine: sa.Engine, function: Callable[[sa.Connection], T], waiting: Waiting | None = None
) -> T:
    """Do something in a transaction, off the event loop.

    A server that is away is waited for. A file that can't be written, for want of room say, is waited for by
    who says so to someone; who has a caller waiting gets the error.

    Args:
        engine: The database.
        function: What to do; it may be done again when the connection breaks.
        waiting: Told why it takes long.

    Raises:
        ResourceExhausted: SQLite's file can't be used now, and nobody is told.
    """

    def work() -> T:
        with engine.begin() as connection:
            return function(connection)

    while True:
        try:
            return await DATABASE.run(work)
        except sa.exc.OperationalError as error:
            if not _passes(engine, error):
                raise
            if not shared(engine) and waiting is None:
                raise ResourceExhausted(
                    f"The gateway's database can't be used: {error.orig}.",
                    fix="Free disk space, then try again.",
                    reason="DATABASE_UNUSABLE",
                ) from error
            log.warning("the database is waited for: %s", error.orig)
            if waiting is not None:
                await waiting(f"waiting for the gateway's database: {error.orig}")
        await asyncio.sleep(_RETRY_SECONDS)


def upsert(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> None:
    """Write a row in place of the one with the same primary key, also while others do so."""
    keys = [column.name for column in table.primary_key]
    rest = {name: value for name, value in row.items() if name not in keys}
    statement = _insert(connection, table).values(row)
    if rest:
        statement = statement.on_conflict_do_update(index_elements=keys, set_=rest)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    connection.execute(statement)


def insert_once(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> None:
    """Write a row unless there is one with the same primary key, also while others do so."""
    keys = [column.name for column in table.primary_key]
    connection.execute(_insert(connection, table).values(row).on_conflict_do_nothing(index_elements=keys))


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


@dataclass
class Trouble:
    """What the database was last waited for, as SQLite says it; empty when it works."""

    text: str = ""


TROUBLE = Trouble()
"""Of this process. The workflow engine tells nobody else that it waits."""


def let_the_engine_wait() -> None:
    """Have DBOS wait for a full disk as it waits for a lock, which it knows by its text alone.

    A step whose result it could not write would else end the workflow, though the work is done.
    """
    if not sa.event.contains(sa.Engine, "handle_error", _as_a_lock):
        sa.event.listen(sa.Engine, "handle_error", _as_a_lock, retval=True)


def _as_a_lock(context: sa.engine.ExceptionContext) -> BaseException | None:
    error = context.original_exception
    if not isinstance(error, sqlite3.OperationalError) or not _of_the_file(error):
        return None
    TROUBLE.text = str(error)
    if "database is locked" in str(error):
        return None
    told = sqlite3.OperationalError(f"{error} (as if the database is locked)")
    told.sqlite_errorcode = error.sqlite_errorcode
    return sa.exc.OperationalError(context.statement, context.parameters, told)


def _passes(engine: sa.Engine, error: sa.exc.OperationalError) -> bool:
    """Tell whether an error is one of a disk or a server, which may be back, and not of a statement."""
    if shared(engine):
        return True
    return isinstance(error.orig, sqlite3.OperationalError) and _of_the_file(error.orig)


def _of_the_file(error: sqlite3.OperationalError) -> bool:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & _PRIMARY_CODE in _FILE_ERRORS


def _patient(connection: Any, _record: object) -> None:
    # The workflow engine writes to the same file: wait for it instead of failing. A transaction that began
    # with a read could not wait any more once it writes.
    connection.isolation_level = "IMMEDIATE"
    connection.execute("PRAGMA busy_timeout=30000")
    connection.execute("PRAGMA journal_mode=WAL")  # who reads does not wait for who writes


def _make_tables(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
    inspector = sa.inspect(connection)
    known = inspector.has_table(RUNS.name)
    columns = {column["name"] for column in inspector.get_columns(RUNS.name)} if known else set()
    _METADATA.create_all(connection)
    if not known:
        return
    for column in RUNS.columns:
        if column.name not in columns:
            made = sa.schema.CreateColumn(column).compile(connection)
            connection.execute(sa.text(f"ALTER TABLE {RUNS.name} ADD COLUMN {made}"))
    for index in sorted(RUNS.indexes, key=lambda index: str(index.name)):
        index.create(connection, checkfirst=True)
    _fill_columns(connection)


def _fill_columns(connection: sa.Connection) -> None:
    """Copy to their columns what the documents of an older version hold."""
    query = sa.select(RUNS.c.id, sa.cast(RUNS.c.document, sa.Text)).where(RUNS.c.state == "")
    for run_id, text in connection.execute(query).all():
        try:
            data = json.loads(text)
            name, state, revision = data["pipeline"]["name"], data["state"], data["revision"]
            values = {"name": str(name), "state": str(state), "revision": int(revision)}
        except (ValueError, TypeError, KeyError) as error:
            log.warning("the record of %s can't be read: %r", run_id, error)
            continue
        connection.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(values))


def _bad_url() -> InvalidInput:
    return InvalidInput(
        "WEB4LORA_DATABASE is not the address of a database.",
        fix="Use postgresql://user:password@host/name, or leave it empty for SQLite.",
    )
