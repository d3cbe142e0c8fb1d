"""Runs in the database, on SQLite and on PostgreSQL, where several gateways work with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from dbos import _utils as dbos_utils
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, ResourceExhausted, Unavailable
from web4lora_chassis.jobs import Progress
from web4lora_chassis.rpc import ref_message, to_json
from web4lora_gateway import gateways as gateways_module
from web4lora_gateway.database import RUNS, TROUBLE, call, let_the_engine_wait, open_database
from web4lora_gateway.gateways import Gateways
from web4lora_gateway.outcomes import Reuse
from web4lora_gateway.pipeline import check_pipeline
from web4lora_gateway.plan import Call, Planner
from web4lora_gateway.records import RunRecord, RunState, StageResult, StageState, UnreadableRun
from web4lora_gateway.run_creation import RunCreator
from web4lora_gateway.run_messages import run_message
from web4lora_gateway.runs import RunBook, Unended
from web4lora_gateway.settings import GatewaySettings
from web4lora_gateway.stage_results import StageResults
from web4lora_gateway.stages import Inputs, Prepare
from web4lora_gateway.workers import Workers

from tests.servers.postgresql import server

EARLIER = Path(__file__).parents[2] / "earlier_state" / "gateway.sql"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/gateway.sqlite"
    address: str = request.getfixturevalue("postgresql")
    return address


def record(run_id: str, request_id: str, **fields: Any) -> RunRecord:
    return RunRecord(run_id, request_id, "digest", "00", {"name": "demo"}, created_at=1.0, **fields)


async def add(book: RunBook, request_id: str) -> RunRecord:
    prefix = "run_2026-01-01_"
    made, _ = await book.create(lambda number: record(f"{prefix}{number}", request_id), prefix, request_id)
    return made


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def keeping_up(*books: RunBook):
    tasks = [asyncio.create_task(book.keep_up()) for book in books]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_one_request_makes_one_run_and_no_two_runs_share_an_id(url: str) -> None:
    async def main() -> None:
        books = [RunBook(open_database(url), name) for name in ("a", "b")]
        requests = [f"request-{number}" for number in range(8)] * 2
        made = await asyncio.gather(*(add(book, request) for book in books for request in requests))
        by_request = {each.request_id: each.id for each in made}
        assert all(by_request[each.request_id] == each.id for each in made)
        assert len(set(by_request.values())) == 8
        listed, token = await books[0].page(5)
        rest, last = await books[1].page(5, token)
        assert sorted(run.id for run in [*listed, *rest]) == sorted(by_request.values())
        assert not last
        with pytest.raises(InvalidInput, match="page_token"):
            await books[0].page(5, "run_none")

    asyncio.run(main())


def test_no_change_is_lost_to_another_one(url: str) -> None:
    async def main() -> None:
        books = [RunBook(open_database(url), name) for name in ("a", "b")]
        run_id = (await add(books[0], "r")).id

        def more(before: RunRecord) -> RunRecord:
            return before.with_stage("train", work_seconds=before.stage("train").work_seconds + 1)

        await asyncio.gather(*(book.change(run_id, more) for book in books for _ in range(10)))
        assert (await books[1].get(run_id)).stage("train").work_seconds == 20

    asyncio.run(main())


def test_a_run_is_watched_and_cancelled_through_any_gateway(postgresql: str) -> None:
    async def main() -> None:
        here, there = (RunBook(open_database(postgresql), name) for name in ("a", "b"))
        run_id = (await add(here, "r")).id
        await here.carry(run_id)
        cancelled = here.cancelled(run_id)
        seen: list[RunRecord] = []

        async def watch() -> None:
            async for run in there.watch(run_id):
                seen.append(run)

        async with keeping_up(here, there), asyncio.timeout(60):
            watching = asyncio.create_task(watch())
            await here.change(run_id, lambda run: run.with_stage("train", state=StageState.RUNNING))
            await here.progress(run_id, "train", Progress("train", 1, 3))
            await eventually(lambda: _true(seen and seen[-1].stage("train").progress.done == 1))
            assert (await here.get(run_id)).stage("train").progress.done == 1
            await there.change(run_id, lambda run: run.changed(state=RunState.CANCELLING))
            await cancelled.wait()
            await here.change(run_id, lambda run: run.changed(state=RunState.CANCELLED), carried=True)
            await watching
        revisions = [run.revision for run in seen]
        assert revisions == sorted(set(revisions))
        assert seen[-1].state is RunState.CANCELLED

    asyncio.run(main())


async def _true(value: object) -> bool:
    return bool(value)


def test_a_gateway_that_lost_a_run_writes_no_more_to_it(url: str) -> None:
    async def main() -> None:
        slow, fast, late = (RunBook(open_database(url), name) for name in ("slow", "fast", "late"))
        run_id = (await add(slow, "r")).id
        await slow.carry(run_id)
        left = Unended(run_id, "slow")
        assert [await book.adopt(left) for book in (fast, late)] == [True, False]
        with pytest.raises(asyncio.CancelledError):
            await slow.change(run_id, lambda run: run.changed(state=RunState.FAILED), carried=True)
        assert (await fast.get(run_id)).state is RunState.QUEUED

    asyncio.run(main())


def test_a_gateway_that_is_silent_is_gone_and_one_that_leaves_is_gone_at_once(
    postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(gateways_module.time, "monotonic", lambda: now[0])

    async def main() -> None:
        a, b, c = (Gateways(open_database(postgresql), name) for name in "abc")
        for each in (a, b, c):
            await each.beat()
        assert await a.live() == {"a", "b", "c"}
        now[0] += gateways_module.LEASE_SECONDS - 1
        await b.beat()
        await c.leave()
        assert await a.live() == {"a", "b"}
        now[0] += 2
        assert await a.live() == {"a", "b"}
        now[0] += gateways_module.LEASE_SECONDS
        assert await a.live() == {"a"}
        await b.beat()
        assert await a.live() == {"a", "b"}

    asyncio.run(main())


def test_a_server_that_hangs_is_waited_for_at_the_start_and_one_that_is_not_there_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        with server() as database:
            url = f"{database.address}?connect_timeout=2"
            database.signal(signal.SIGSTOP)
            try:
                opening = asyncio.create_task(asyncio.to_thread(open_database, url))
                await eventually(lambda: _true("the database is waited for" in caplog.text or opening.done()))
                assert not opening.done()
            finally:
                database.signal(signal.SIGCONT)
            (await opening).dispose()
        with pytest.raises(Unavailable, match="is out of reach"):
            await asyncio.to_thread(open_database, url)

    asyncio.run(main())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "{",
        lambda data: json.dumps([]),
        lambda data: json.dumps({**data, "schema": 1000}),
        lambda data: json.dumps({**data, "state": "DREAMING"}),
        lambda data: json.dumps({"id": data["id"]}),
    ],
)
def test_a_record_that_can_not_be_read_is_one_row_of_the_list(tmp_path: Path, damage: Any) -> None:
    async def main() -> None:
        engine = open_database(f"sqlite:///{tmp_path}/gateway.sqlite")
        book = RunBook(engine, "a")
        ids = [(await add(book, request)).id for request in ("1", "2")]
        text = damage((await book.get(ids[0])).to_json())
        with engine.begin() as connection:
            connection.execute(
                sa.text("UPDATE web4lora_runs SET document = :text WHERE id = :id"),
                {"text": text, "id": ids[0]},
            )
        book = RunBook(open_database(f"sqlite:///{tmp_path}/gateway.sqlite"), "a")
        runs, _ = await book.page(10)
        unreadable, whole = sorted(runs, key=lambda run: run.id)
        assert isinstance(whole, RunRecord)
        assert isinstance(unreadable, UnreadableRun)
        message = run_message(unreadable)
        assert (message.id, message.pipeline.name, message.request_id) == (ids[0], "demo", "1")
        assert message.state == gateway_pb2.RUN_STATE_QUEUED
        assert f"The record of {ids[0]} can't be read" in message.error.message
        with pytest.raises(FailedPrecondition, match="can't be read"):
            await book.change(ids[0], lambda run: run.changed(state=RunState.CANCELLING))
        assert [run.id async for run in book.watch(ids[0])] == [ids[0]]

    asyncio.run(main())


def test_what_a_newer_version_wrote_is_kept(url: str) -> None:
    newer = {"colour": {"of": "the run"}}

    async def main() -> None:
        engine = open_database(url)
        book = RunBook(engine, "a")
        run_id = (await add(book, "r")).id
        data = (await book.get(run_id)).to_json() | newer
        data["stages"][1] |= newer
        data["stages"].append({**data["stages"][0], "name": "celebrate"})
        data["stages"][0]["progress"] |= newer
        with engine.begin() as connection:
            connection.execute(sa.update(RUNS).where(RUNS.c.id == run_id).values(document=data))
        assert len(run_message(await book.get(run_id)).stages) == 6
        await book.change(run_id, lambda run: run.with_stage("train", state=StageState.RUNNING))
        with engine.begin() as connection:
            kept = connection.execute(sa.select(RUNS.c.document)).scalar_one()
        assert kept["colour"] == newer["colour"]
        train = kept["stages"][1]
        assert (train["state"], train["colour"]) == ("RUNNING", newer["colour"])
        assert kept["stages"][-1]["name"] == "celebrate"

    asyncio.run(main())


def test_a_database_of_the_version_before_gets_its_columns_in_place(tmp_path: Path) -> None:
    place = tmp_path / "gateway.sqlite"
    with contextlib.closing(sqlite3.connect(place)) as connection:
        connection.executescript(EARLIER.read_text())

    async def main() -> None:
        for _ in range(2):  # the second time there is nothing left to do
            book = RunBook(open_database(f"sqlite:///{place}"), "a")
            runs, _ = await book.page(10, where=[RUNS.c.state == "SUCCEEDED", RUNS.c.name == "demo"])
            assert [run.id for run in runs] == ["run_2026-11-26_1"]
            assert await book.unended() == [Unended("run_2026-11-26_2", "")]
        await book.change("run_2026-11-26_2", lambda run: replace(run, owner="ann"))
        assert [run.id for run in (await book.page(10, where=[RUNS.c.owner == "ann"]))[0]] == [
            "run_2026-11-26_2"
        ]

    asyncio.run(main())


def test_a_creation_whose_caller_goes_away_is_finished(tmp_path: Path) -> None:
    async def main() -> None:
        book = RunBook(open_database(f"sqlite:///{tmp_path}/gateway.sqlite"), "a")
        settings = GatewaySettings(home=tmp_path)
        at_start, go_on, started = asyncio.Event(), asyncio.Event(), []

        async def start(run_id: str) -> None:
            at_start.set()
            await go_on.wait()
            started.append(run_id)

        async def deleted(_prefix: str) -> frozenset[str]:
            return frozenset()

        nobody: Any = None
        creator = RunCreator(book, open_store(settings), nobody, settings, start, deleted)
        call = asyncio.create_task(creator._make("mine", "digest", {"name": "demo"}, "", {}, {}))
        await at_start.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        go_on.set()
        run = await book.by_request("mine")
        assert run is not None
        await eventually(lambda: _true(started == [run.id]))
        assert await creator._started(run) is run
        assert started == [run.id, run.id], "the same request starts a run that was not started"

    asyncio.run(main())


def full(engine: sa.Engine, pages: int) -> None:
    """Let a database grow to so many pages only, on its pooled connection."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")


def test_a_full_disk_is_waited_for_by_runs_and_told_to_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web4lora_gateway.database._RETRY_SECONDS", 0.01)

    async def main() -> None:
        engine = open_database(f"sqlite:///{tmp_path}/gateway.sqlite")
        lines: list[str] = []
        statement = sa.text("INSERT INTO filler VALUES (:text)")

        def fill(connection: sa.Connection) -> None:
            connection.execute(statement, {"text": "x" * 100_000})

        async def waiting(line: str) -> None:
            lines.append(line)
            if len(lines) == 2:
                await asyncio.to_thread(full, engine, 1_000_000)

        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE filler (text)")
        full(engine, 1)
        with pytest.raises(ResourceExhausted, match="disk is full"):
            await call(engine, fill)
        await call(engine, fill, waiting)
        assert len(lines) == 2
        assert "waiting for the gateway's database: database or disk is full" in lines[0]
        with pytest.raises(sa.exc.OperationalError, match="no such table"):
            await call(engine, lambda connection: connection.execute(sa.text("SELECT * FROM none")), waiting)

    asyncio.run(main())


def test_a_run_that_plans_a_stage_waits_for_a_full_disk_at_every_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web4lora_gateway.database._RETRY_SECONDS", 0.01)

    async def main() -> None:
        settings = GatewaySettings(home=tmp_path)
        store, workers = open_store(settings), Workers(settings)
        (tmp_path / "file").write_text("a base")
        base, data = (
            store.put(kind, kind, {"file": tmp_path / "file"}) for kind in ("base_model", "dataset")
        )
        pipeline = gateway_pb2.Pipeline(name="demo", base={"model": "smollm2-135m-instruct"})
        pipeline.dataset.artifact.CopyFrom(ref_message(data))
        run = RunRecord("run_1", "r", "", "00", check_pipeline(pipeline))
        engine = open_database(f"sqlite:///{tmp_path}/gateway.sqlite")
        results, stage, inputs = StageResults(engine), Prepare(), Inputs.of(run)
        key = stage.key(inputs, stage.spec(inputs), {})
        await results.save(
            "prepare", StageResult(key, "run_0", {"base": to_json(ref_message(base))}, {}, 1.0)
        )
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE filler (text)")
        tried: list[str] = []
        lines: list[str] = []

        def full_at_first(cursor: Any, statement: str, _parameters: object, _context: object) -> None:
            if statement in tried:
                return
            tried.append(statement)
            cursor.execute("PRAGMA max_page_count=1")
            try:
                cursor.execute("INSERT INTO filler VALUES (?)", ("x" * 100_000,))
            finally:
                cursor.execute("PRAGMA max_page_count=1000000")

        async def waiting(line: str) -> None:
            lines.append(line)

        async def at_once(_who: str, call: Call) -> Any:
            return await call()

        sa.event.listen(engine, "do_execute", full_at_first)
        plan = await Planner(results, store, workers, waiting).plan(run, stage, at_once)
        assert isinstance(plan, Reuse)
        tables = ("web4lora_doomed", "web4lora_stage_results", "web4lora_holds")
        assert [next(table for table in tables if table in statement) for statement in tried] == list(tables)
        assert len(lines) == len(tried)
        assert all("database or disk is full" in line for line in lines)

    asyncio.run(main())


def test_the_workflow_engine_waits_for_a_full_disk_as_for_a_lock(tmp_path: Path) -> None:
    let_the_engine_wait()
    engine = sa.create_engine(f"sqlite:///{tmp_path}/engine.sqlite")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE filler (text)")
    full(engine, 1)
    with pytest.raises(sa.exc.OperationalError) as caught, engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO filler VALUES (:text)"), {"text": "x" * 100_000})
    assert dbos_utils.retriable_sqlite_exception(caught.value)
    assert TROUBLE.text == "database or disk is full"
    with pytest.raises(sa.exc.OperationalError) as other, engine.begin() as connection:
        connection.execute(sa.text("SELECT * FROM none"))
    assert not dbos_utils.retriable_sqlite_exception(other.value)
    TROUBLE.text = ""
