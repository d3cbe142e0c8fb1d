"""Every run: the database is the truth, changed by compare and set, and watched by polling it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.jobs import JobFailure, Progress

from web4lora_gateway.database import RUNS, Waiting, call, shared
from web4lora_gateway.records import (
    RunRecord,
    RunState,
    StageState,
    UnreadableRun,
    later,
    progress_from_json,
)

T = TypeVar("T")
AnyRun = RunRecord | UnreadableRun

UNREADABLE = "RUN_UNREADABLE"
"""Reason of the error that a run's document is of a form that this version can't read."""

_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 1.0
_IDS_AT_ONCE = 500
_COLUMNS = (
    RUNS.c.id, RUNS.c.request_id, RUNS.c.created_at, RUNS.c.name, RUNS.c.state, RUNS.c.version,
    RUNS.c.revision, sa.cast(RUNS.c.progress, sa.Text).label("progress"),
    sa.cast(RUNS.c.document, sa.Text).label("document"),
)  # fmt: skip


class Lost(asyncio.CancelledError):
    """Another gateway carries the run on: what this one began for it ends without a trace.

    It is a CancelledError, because the workflow engine writes every other error down as the workflow's end.
    """


@dataclass(frozen=True)
class Unended:
    """A run that has not ended, as the reconciler needs it."""

    id: str
    gateway: str


@dataclass
class _Watch:
    """What the watchers of one run share."""

    latest: AnyRun | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: int = 0


class RunBook:
    """Reads, changes and watches the runs in the database.

    In memory are the latest progress of runs that this gateway carries on, and what its watchers see.
    Where other gateways work with the same database, the progress goes there too, once a second, and the
    rows of runs that are watched or carried on here are looked at five times a second, in one query.

    Args:
        engine: The database.
        gateway: The name of this gateway.
    """

    def __init__(self, engine: sa.Engine, gateway: str = "") -> None:
        self._engine = engine
        self._gateway = gateway
        self._progress: dict[str, tuple[str, Progress, int]] = {}
        self._unwritten: set[str] = set()
        self._cancels: dict[str, asyncio.Event] = {}
        self._watches: dict[str, _Watch] = {}
        self._numbers: dict[str, int] = {}
        self._begun: set[asyncio.Task[Any]] = set()

    async def create(
        self, make: Callable[[int], RunRecord], prefix: str, request_id: str
    ) -> tuple[RunRecord, bool]:
        """Add a run, unless this request has made one, on whichever gateway.

        Args:
            make: Makes the record from the lowest number its id may take.
            prefix: Beginning of the ids that the number must differ from: "run_<date>_".
            request_id: The caller's key.

        Returns:
            The run, durable, and whether it is new.
        """
        while True:
            before = await self.by_request(request_id)
            if before is not None:
                return before, False
            if prefix not in self._numbers:
                self._use_number(prefix, await self._last_number(prefix))
            number = self._use_number(prefix, self._numbers[prefix] + 1)
            record = await asyncio.to_thread(make, number)
            self._use_number(prefix, int(record.id.removeprefix(prefix)))
            row = {
                "id": record.id,
                "request_id": record.request_id,
                "created_at": record.created_at,
                "gateway": self._gateway,
                "version": 1,
                **_values(record),
            }
            try:
                await self._write(sa.insert(RUNS).values(row))
            except sa.exc.IntegrityError:  # the request or the number was used at this very moment
                self._use_number(prefix, await self._last_number(prefix))
                continue
            return record, True

    async def find(self, run_id: str, waiting: Waiting | None = None) -> AnyRun:
        """Return a run as it is now, also one whose document can't be read; "latest" names the newest one.

        Raises:
            NotFound: No such run.
        """
        query = sa.select(*_COLUMNS)
        if run_id == "latest":
            query = query.order_by(RUNS.c.created_at.desc(), RUNS.c.id.desc()).limit(1)
        else:
            query = query.where(RUNS.c.id == run_id)
        found = await self._read(query, waiting)
        if not found and run_id == "latest":
            raise NotFound("There is no run yet.", fix="`web4lora run PIPELINE.yaml` makes one.")
        if not found:
            raise NotFound(
                f"There is no run {run_id!r}.",
                fix="`web4lora runs list` shows all.",
                metadata={"run": run_id},
            )
        return found[0][0]

    async def get(self, run_id: str, waiting: Waiting | None = None) -> RunRecord:
        """Return a run as it is now; "latest" names the newest one.

        Raises:
            NotFound: No such run.
            FailedPrecondition: Its document can't be read.
        """
        return _readable(await self.find(run_id, waiting))

    async def by_request(self, request_id: str) -> RunRecord | None:
        """Return the run that a request made, or None.

        Raises:
            FailedPrecondition: Its document can't be read.
        """
        found = await self._read(sa.select(*_COLUMNS).where(RUNS.c.request_id == request_id))
        return _readable(found[0][0]) if found else None

    async def page(
        self, size: int, token: str = "", where: Sequence[sa.ColumnElement[bool]] = ()
    ) -> tuple[list[AnyRun], str]:
        """Return a page of runs, newest first, and the token of the next one.

        Args:
            size: At most so many.
            token: The token of the page; empty: the first one.
            where: What holds of the columns of each run.

        Raises:
            InvalidInput: A token of no page.
        """
        query = sa.select(*_COLUMNS).where(*where)
        if token:
            created_at, run_id = _place(token)
            query = query.where(
                sa.tuple_(RUNS.c.created_at, RUNS.c.id)
                < sa.tuple_(sa.literal(created_at), sa.literal(run_id))
            )
        query = query.order_by(RUNS.c.created_at.desc(), RUNS.c.id.desc()).limit(size + 1)
        runs = [run for run, _ in await self._read(query)]
        return runs[:size], page_token(runs[size - 1]) if len(runs) > size else ""

    async def unended(self) -> list[Unended]:
        """Return the runs that have not ended, oldest first."""
        query = sa.select(RUNS.c.id, RUNS.c.gateway).where(~RUNS.c.ended).order_by(RUNS.c.created_at)
        return [Unended(row.id, row.gateway) for row in await self._rows(query)]

    async def change(
        self,
        run_id: str,
        change: Callable[[RunRecord], RunRecord],
        *,
        carried: bool = False,
        waiting: Waiting | None = None,
    ) -> RunRecord:
        """Change a run, on disk first, and wake who watches. What was begun is finished, caller or not.

        Args:
            run_id: The run.
            change: Makes the new record from the current one; returning that very one changes nothing. It is
                asked again when another change came between.
            carried: This gateway must be the one that carries the run on.
            waiting: Told why the database is waited for.

        Raises:
            NotFound: No such run.
            FailedPrecondition: Its document can't be read.
            Lost: Another gateway carries the run on.
        """
        return await self.finish(self._change(run_id, change, carried, waiting))

    async def _change(
        self, run_id: str, change: Callable[[RunRecord], RunRecord], carried: bool, waiting: Waiting | None
    ) -> RunRecord:
        query = sa.select(*_COLUMNS).where(RUNS.c.id == run_id)

        def compare_and_set(connection: sa.Connection) -> tuple[RunRecord, bool, int]:
            """Return the run, whether it is another one now, and how many rows that changed."""
            row = connection.execute(query).one_or_none()
            if row is None:
                raise NotFound(f"There is no run {run_id!r}.", metadata={"run": run_id})
            before = self._with_progress(_readable(_run(row)))
            record = change(before)
            if record is before:
                return before, False, 0
            statement = (
                sa.update(RUNS)
                .where(RUNS.c.id == run_id, RUNS.c.version == row.version)
                .values(version=row.version + 1, **_values(record))
            )
            if carried:
                statement = statement.where(RUNS.c.gateway == self._gateway)
            return record, True, connection.execute(statement).rowcount

        while True:
            record, changed, written = await call(self._engine, compare_and_set, waiting)
            if not changed:
                return record
            if written:
                break
            if carried:
                await self._require_carried(run_id, waiting)
        self._publish(record)
        return record

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something to its end, even if the caller is cancelled meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._begun.add(task)  # the loop itself would forget it
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)

    async def carry(self, run_id: str, waiting: Waiting | None = None) -> RunRecord:
        """Make this gateway the one that carries a run on, and return the run.

        Raises:
            NotFound: No such run.
            FailedPrecondition: Its document can't be read.
        """
        await self._write(sa.update(RUNS).where(RUNS.c.id == run_id).values(gateway=self._gateway), waiting)
        record = await self.get(run_id, waiting)
        if record.state is RunState.CANCELLING:
            self.cancelled(run_id).set()
        return record

    async def adopt(self, run: Unended) -> bool:
        """Take a run over from a gateway that is gone; False when another one was faster."""
        statement = (
            sa.update(RUNS)
            .where(RUNS.c.id == run.id, RUNS.c.gateway == run.gateway, ~RUNS.c.ended)
            .values(gateway=self._gateway)
        )
        return bool(await self._write(statement))

    def put_down(self, run_id: str) -> None:
        """Forget what only who carries a run on needs."""
        self._progress.pop(run_id, None)
        self._unwritten.discard(run_id)
        self._cancels.pop(run_id, None)

    async def progress(self, run_id: str, stage: str, progress: Progress) -> None:
        """Tell how far a stage of a run that is carried on here is."""
        before = self._progress.get(run_id)
        if before is not None and before[:2] == (stage, progress):
            return
        record = await self.find(run_id) if before is None or before[0] != stage else None
        revision = max(before[2] if before else 0, record.revision if record else 0)
        self._progress[run_id] = (stage, progress, later(revision))
        self._unwritten.add(run_id)
        watch = self._watches.get(run_id)
        if watch is not None and isinstance(watch.latest, RunRecord):
            self._publish(self._with_progress(watch.latest))

    async def all_wait(self, why: str) -> None:
        """Tell of every stage at work here that it waits."""
        for run_id, (stage, _, _) in list(self._progress.items()):
            await self.progress(run_id, stage, Progress(phase="wait", message=f"{why} …"))

    def cancelled(self, run_id: str) -> asyncio.Event:
        """Return the event that is set once the cancel of a run that is carried on here was asked for."""
        return self._cancels.setdefault(run_id, asyncio.Event())

    async def watch(self, run_id: str) -> AsyncIterator[AnyRun]:
        """Yield a run as it is now, then after changes, at most some five a second, and end with it.

        Raises:
            NotFound: No such run.
        """
        run = await self.find(run_id)
        with self._watching(run.id) as watch:
            self._publish(await self.find(run.id))  # it may have changed before it was watched
            yield run
            while isinstance(run, RunRecord) and not run.state.terminal:
                await asyncio.sleep(_POLL_SECONDS)
                while watch.latest is None or watch.latest.revision <= run.revision:
                    await watch.news.wait()
                run = watch.latest
                yield run

    async def keep_up(self) -> None:
        """Look for ever after what other gateways change, and write down how far the runs of this one are."""
        loop = asyncio.get_running_loop()
        written_at = loop.time()
        while shared(self._engine):
            await asyncio.sleep(_POLL_SECONDS)
            if loop.time() - written_at >= _PROGRESS_SECONDS:
                written_at = loop.time()
                await self._write_progress()
            await self._poll()

    async def _poll(self) -> None:
        columns = sa.select(RUNS.c.id, RUNS.c.revision, RUNS.c.state)
        changed: list[str] = []
        for ids in _chunks({*self._watches, *self._cancels}):
            for row in await self._rows(columns.where(RUNS.c.id.in_(ids))):
                if row.state == RunState.CANCELLING and row.id in self._cancels:
                    self._cancels[row.id].set()
                watch = self._watches.get(row.id)
                if watch and watch.latest and watch.latest.revision < row.revision:
                    changed.append(row.id)
        for ids in _chunks(changed):
            for run, _ in await self._read(sa.select(*_COLUMNS).where(RUNS.c.id.in_(ids))):
                self._publish(run)

    async def _write_progress(self) -> None:
        statement = (
            sa.update(RUNS)
            .where(
                RUNS.c.id == sa.bindparam("run"),
                RUNS.c.gateway == self._gateway,
                RUNS.c.revision < sa.bindparam("later"),
                ~RUNS.c.ended,
            )
            .values(revision=sa.bindparam("later"), progress=sa.bindparam("told"))
        )
        unwritten, self._unwritten = self._unwritten, set()
        rows = []
        for run_id in sorted(unwritten & self._progress.keys()):
            stage, progress, revision = self._progress[run_id]
            told = {"stage": stage, "progress": asdict(progress), "revision": revision}
            rows.append({"run": run_id, "later": revision, "told": told})
        if rows:  # all at once: where hundreds wait, each job that ends is news to all of them
            await call(self._engine, lambda connection: connection.execute(statement, rows))

    def _publish(self, run: AnyRun) -> None:
        """Show a run to its watchers, and to who carries it on whether it is to be cancelled."""
        if run.id in self._progress:  # the next progress is a later one
            stage, progress, revision = self._progress[run.id]
            self._progress[run.id] = (stage, progress, max(revision, run.revision))
        if isinstance(run, RunRecord):
            if run.state.terminal:
                self.put_down(run.id)
            elif run.state is RunState.CANCELLING and run.id in self._cancels:
                self._cancels[run.id].set()
        watch = self._watches.get(run.id)
        if watch is not None and (watch.latest is None or watch.latest.revision < run.revision):
            watch.latest = run
            watch.news.set()
            watch.news = asyncio.Event()

    @contextlib.contextmanager
    def _watching(self, run_id: str) -> Iterator[_Watch]:
        watch = self._watches.setdefault(run_id, _Watch())
        watch.watchers += 1
        try:
            yield watch
        finally:
            watch.watchers -= 1
            if not watch.watchers:
                del self._watches[run_id]

    def _with_progress(self, record: RunRecord) -> RunRecord:
        """Return a run with the progress of its stage that is in memory, where that is newer."""
        stage, progress, revision = self._progress.get(record.id, ("", Progress(), 0))
        return _with_progress(record, stage, progress, revision)

    async def _require_carried(self, run_id: str, waiting: Waiting | None) -> None:
        query = sa.select(RUNS.c.gateway).where(RUNS.c.id == run_id)
        gateways = [row.gateway for row in await self._rows(query, waiting)]
        if gateways != [self._gateway]:
            raise Lost(f"{run_id} is carried on by {gateways}")

    def _use_number(self, prefix: str, number: int) -> int:
        """Give no id up to this number any more; returns it."""
        self._numbers[prefix] = max(self._numbers.get(prefix, 0), number)
        return number

    async def _last_number(self, prefix: str) -> int:
        query = (
            sa.select(RUNS.c.id)
            .where(RUNS.c.id.startswith(prefix, autoescape=True))
            .order_by(sa.func.length(RUNS.c.id).desc(), RUNS.c.id.desc())
            .limit(1)
        )
        return max((int(row.id.removeprefix(prefix)) for row in await self._rows(query)), default=0)

    async def _read(self, query: sa.Select[Any], waiting: Waiting | None = None) -> list[tuple[AnyRun, int]]:
        """Return the runs of rows with `_COLUMNS`, and the versions of their documents."""
        runs = [(_run(row), row.version) for row in await self._rows(query, waiting)]
        return [
            (self._with_progress(run) if isinstance(run, RunRecord) else run, version)
            for run, version in runs
        ]

    async def _rows(self, query: sa.Select[Any], waiting: Waiting | None = None) -> list[Any]:
        return await call(self._engine, lambda connection: list(connection.execute(query)), waiting)

    async def _write(self, statement: sa.Executable, waiting: Waiting | None = None) -> int:
        """Return how many rows were changed."""
        return await call(self._engine, lambda connection: connection.execute(statement).rowcount, waiting)


def page_token(run: AnyRun) -> str:
    """Return the token of the page behind a run: its place in the order, which outlives the run."""
    return f"{run.created_at!r}/{run.id}"


def _place(token: str) -> tuple[float, str]:
    """Return the place in the order that a page's token stands for.

    Raises:
        InvalidInput: It is none of ours.
    """
    time, _, run_id = token.partition("/")
    try:
        created_at = float(time)
    except ValueError:
        created_at = math.nan
    if not math.isfinite(created_at) or not run_id:
        raise InvalidInput("page_token names no page of this listing.", metadata={"field": "page_token"})
    return created_at, run_id


def _run(row: Any) -> AnyRun:
    try:
        record = RunRecord.from_json(json.loads(row.document))
        if row.progress is not None:
            told = json.loads(row.progress)
            progress = progress_from_json(told["progress"])
            record = _with_progress(record, told["stage"], progress, told["revision"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return UnreadableRun(
            row.id, row.request_id, row.name, row.state, row.created_at, row.revision,
            JobFailure(
                UNREADABLE,
                f"The record of {row.id} can't be read by this version of the gateway: {error}.",
                "Start the version that wrote it.",
                {"run": row.id},
            ),
        )  # fmt: skip
    return record


def _with_progress(record: RunRecord, stage: str, progress: Progress, revision: int) -> RunRecord:
    if revision <= record.revision or record.stage(stage).state not in (
        StageState.QUEUED,
        StageState.RUNNING,
    ):
        return record
    return replace(record.with_stage(stage, progress=progress), revision=revision)


def _values(record: RunRecord) -> dict[str, Any]:
    """Return the columns of a run that follow from its record."""
    return {
        "ended": record.state.terminal,
        "document": record.to_json(),
        "revision": record.revision,
        "state": str(record.state),
        "name": str(record.pipeline["name"]),
        "owner": record.owner,
        "labels": dict(record.labels),
    }


def _readable(run: AnyRun) -> RunRecord:
    if isinstance(run, RunRecord):
        return run
    error = run.error
    raise FailedPrecondition(error.message, fix=error.fix, reason=error.reason, metadata=error.metadata)


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    known = list(ids)
    for start in range(0, len(known), _IDS_AT_ONCE):
        yield known[start : start + _IDS_AT_ONCE]
