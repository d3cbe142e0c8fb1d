"""Which runs go by the settings, and what is said of those that stay."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from web4lora_chassis.keeping import DAY_SECONDS
from web4lora_gateway.database import RUNS, open_database
from web4lora_gateway.holds import Holds
from web4lora_gateway.needs import Needs, NeedsFinder
from web4lora_gateway.records import RunRecord, RunState
from web4lora_gateway.retention import Retention
from web4lora_gateway.runs import RunBook
from web4lora_gateway.settings import GatewaySettings

RUNS_BY_AGE: list[tuple[str, float, dict[str, Any]]] = [
    ("run_6", 1, {}),
    ("run_5", 2, {}),
    ("run_4", 3, {"labels": {"nightly": "3"}}),
    ("run_3", 20, {"labels": {"nightly": "3"}}),
    ("run_2", 30, {"labels": {"nightly": "3", "purpose": "release"}}),
    ("run_1", 40, {"kept": True}),
]
"""Newest first: id, days since its end, what else."""


def database(folder: Path) -> sa.Engine:
    engine = open_database(f"sqlite:///{folder}/gateway.sqlite")
    with engine.begin() as connection:
        for number, (run_id, days, fields) in enumerate(RUNS_BY_AGE):
            ended_at = time.time() - days * DAY_SECONDS
            pipeline = {"name": "demo", "digest": str(number) * 64}
            record = RunRecord(
                run_id, run_id, "", "", pipeline, state=RunState.SUCCEEDED, created_at=ended_at,
                ended_at=ended_at, **fields,
            )  # fmt: skip
            row = {"id": run_id, "request_id": run_id, "created_at": ended_at, "ended": True}
            connection.execute(sa.insert(RUNS).values(**row, document=record.to_json()))
    return engine


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({}, []),
        ({"keep_runs": 3}, ["run_3", "run_2"]),
        ({"keep_labels": "nightly:14"}, ["run_3", "run_2"]),
        ({"keep_labels": "nightly:14,purpose=release:always"}, ["run_3"]),
        ({"keep_runs": 1, "keep_labels": "nightly:14,purpose=release:always"}, ["run_5", "run_3"]),
        ({"keep_runs_days": 1.5, "keep_labels": "nightly:always"}, ["run_5"]),
    ],
)
def test_runs_go_by_number_age_and_label(tmp_path: Path, settings: dict[str, Any], gone: list[str]) -> None:
    keep = GatewaySettings(home=tmp_path, **settings)
    engine = database(tmp_path)
    retention = Retention(RunBook(engine), None, None, keep)  # type: ignore[arg-type]
    assert asyncio.run(retention.surplus_runs()) == gone


def test_the_collection_says_that_a_label_keeps_a_run(tmp_path: Path) -> None:
    keep = GatewaySettings(home=tmp_path, keep_labels="nightly:14,purpose=release:always")
    engine = database(tmp_path)
    finder = NeedsFinder(engine, Holds(engine), None, keep)  # type: ignore[arg-type]
    needs = Needs()
    asyncio.run(finder.add_ended_runs(needs, keep_runs=1))
    assert sorted(reason for reasons in needs.digests.values() for reason in reasons) == [
        "run_1, kept",
        "run_2, kept always by its label purpose=release",
        "run_4, kept 14 days by its label nightly",
        "run_6",
    ]
