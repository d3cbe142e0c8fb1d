"""Runs are found by what they are and listed page by page, whatever comes and goes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_gateway.database import RUNS, open_database
from web4lora_gateway.records import RunRecord, RunState
from web4lora_gateway.run_listing import checked_labels, conditions
from web4lora_gateway.runs import RunBook

EARLIER = Path(__file__).parents[2] / "earlier_state" / "gateway.sql"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    sqlite = request.param == "sqlite"
    engine = open_database(
        f"sqlite:///{tmp_path}/gateway.sqlite" if sqlite else request.getfixturevalue("postgresql")
    )
    yield engine
    engine.dispose()


@pytest.fixture
def book(database: sa.Engine) -> RunBook:
    return RunBook(database, "gateway")


def add(book: RunBook, number: int, created_at: float, **fields: object) -> None:
    name = fields.pop("name", "demo")
    record = RunRecord(
        id=f"run_2026-11-26_{number}",
        request_id=f"request {number}",
        request_digest="",
        nonce="",
        pipeline={"name": name},
        created_at=created_at,
    )
    record = replace(record, **fields)
    asyncio.run(book.create(lambda _: record, "run_2026-11-26_", record.request_id))


def listed(book: RunBook, size: int = 100, token: str = "", **fields: object) -> tuple[list[int], str]:
    request = gateway_pb2.ListRunsRequest(**fields)
    runs, token = asyncio.run(book.page(size, token, conditions(request)))
    return [int(run.id.rpartition("_")[2]) for run in runs], token


def numbers(book: RunBook, **fields: object) -> list[int]:
    return listed(book, **fields)[0]


@pytest.fixture
def some(book: RunBook) -> RunBook:
    add(book, 1, 100.0, state=RunState.SUCCEEDED, labels={"team": "a", "why": "first"})
    add(book, 2, 200.0, state=RunState.FAILED, labels={"team": "A"}, name="other")
    add(book, 3, 300.0, state=RunState.RUNNING, owner="ada", labels={"team": "a", "a.b/c": ""})
    add(book, 4, 400.0, state=RunState.QUEUED)
    return book


def test_runs_are_found_by_state_name_and_owner(some: RunBook) -> None:
    assert numbers(some) == [4, 3, 2, 1]
    assert numbers(some, states=["RUN_STATE_FAILED", "RUN_STATE_QUEUED"]) == [4, 2]
    assert numbers(some, name="other") == [2]
    assert numbers(some, owner="ada") == [3]
    assert numbers(some, owner="ada", name="other") == []


def test_runs_are_found_by_all_labels_that_are_given_letter_by_letter(some: RunBook) -> None:
    assert numbers(some, labels={"team": "a"}) == [3, 1]
    assert numbers(some, labels={"team": "A"}) == [2]
    assert numbers(some, labels={"team": "a", "why": "first"}) == [1]
    assert numbers(some, labels={"a.b/c": ""}) == [3]
    assert numbers(some, labels={"why": ""}) == []
    assert numbers(some, labels={"nobody": "has"}) == []


def test_runs_are_found_by_time_the_first_moment_included(some: RunBook) -> None:
    assert numbers(some, created_after={"seconds": 200}) == [4, 3, 2]
    assert numbers(some, created_before={"seconds": 200}) == [1]
    assert numbers(some, created_after={"seconds": 200, "nanos": 1}, created_before={"seconds": 400}) == [3]


def test_filters_hold_on_every_page(some: RunBook) -> None:
    first, token = listed(some, 1, labels={"team": "a"})
    second, end = listed(some, 1, token, labels={"team": "a"})
    assert (first, second, end) == ([3], [1], "")


def test_pages_hold_while_runs_come_and_go(book: RunBook, database: sa.Engine) -> None:
    for number in range(1, 8):
        add(book, number, 100.0 + number // 3)  # some at the very same moment
    first, token = listed(book, 3)
    add(book, 8, 500.0)
    with database.begin() as connection:  # the last of the first page goes, and one that is still to come
        gone = [f"run_2026-11-26_{number}" for number in (first[-1], 2)]
        connection.execute(sa.delete(RUNS).where(RUNS.c.id.in_(gone)))
    rest = []
    while token:
        page, token = listed(book, 2, token)
        rest += page
    assert first == [7, 6, 5]
    assert rest == [4, 3, 1]


@pytest.mark.parametrize("token", ["x", "1.0", "1.0/", "nan/run_1", "inf/run_1", "/run_1"])
def test_a_token_of_no_page_is_refused(book: RunBook, token: str) -> None:
    with pytest.raises(InvalidInput, match="page_token names no page"):
        listed(book, 1, token)


@pytest.mark.parametrize("labels", [{"": "x"}, {"a b": "x"}, {'a"b': "x"}, {"a": "x y"}, {"a": "x" * 64},
                                    {"-a": "x"}, {f"a{n}": "x" for n in range(33)}])  # fmt: skip
def test_labels_of_another_form_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        checked_labels(labels)
    assert caught.value.metadata == {"field": "labels"}


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no state of a run"):
        conditions(gateway_pb2.ListRunsRequest(states=[0]))


def test_runs_of_before_labels_were_there_have_none(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.sqlite")) as connection:
        connection.executescript(EARLIER.read_text())
        known = connection.execute("SELECT count(*) FROM web4lora_runs").fetchone()[0]
    engine = open_database(f"sqlite:///{tmp_path}/gateway.sqlite")
    book = RunBook(engine, "gateway")
    assert len(numbers(book)) == known > 0
    assert numbers(book, labels={"team": "a"}) == []
    engine.dispose()
