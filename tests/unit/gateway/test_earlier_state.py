"""What an older version wrote down is read: steps of its runs, and the keys of its results."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from web4lora_gateway.outcomes import (
    BEGUN,
    PLANNED,
    WORKED,
    Begun,
    Decision,
    Do,
    DoCalls,
    DoJob,
    Done,
    Failed,
    Reuse,
    Stopped,
)
from web4lora_gateway.records import RunRecord
from web4lora_gateway.stages import Inputs, JobStage, stages_of

STATE = Path(__file__).parents[2] / "earlier_state" / "gateway.sql"
JOBS = ["prepare", "train", "package", "deploy", "verify"]


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(STATE.read_text())
    yield connection
    connection.close()


def normalised(data: Any) -> Any:
    """Leave out what is told by being absent as well."""
    return {name: value for name, value in data.items() if value not in (None, "", {})}


def test_the_steps_of_a_run_are_read_and_written_as_before(database: sqlite3.Connection) -> None:
    rows = database.execute("SELECT function_name, output FROM operation_outputs ORDER BY function_id")
    kept = {"begin": BEGUN, "plan": PLANNED, "work": WORKED}
    found: dict[str, Any] = {}
    for name, output in rows:
        form = kept.get(name.partition(" ")[0])
        if form is not None:
            data = json.loads(output)
            found[name] = form.from_json(data)
            assert normalised(form.to_json(found[name])) == normalised(data)
    assert found["begin"] == Begun()
    for stage in JOBS:
        assert isinstance(found[f"plan {stage}"], DoJob), stage
        assert found[f"work {stage}"].job_id.startswith(f"{stage}-")
    assert found["plan promote"].decision == Decision(Do.PROMOTE, "every limit was kept")
    assert isinstance(found["work promote"], Done)


@pytest.mark.parametrize(
    ("form", "data", "kind"),
    [
        (
            PLANNED,
            {"key": "k", "reused": {"key": "k", "run_id": "r", "result": {}}, "spec": None, "decision": None,
             "versions": {}},
            Reuse,
        ),
        (
            PLANNED,
            {"key": "k", "reused": None, "spec": None, "decision": {"do": "nothing"}, "versions": {}},
            DoCalls,
        ),
        (PLANNED, {"cancelled": True}, Stopped),
        (WORKED, {"cancelled": True, "note": "later"}, Stopped),
        (WORKED, {"error": {"reason": "R", "message": "m", "fix": "", "metadata": {"a": "b"}}}, Failed),
        (WORKED, {"result": {}}, Done),
        (BEGUN, {"error": {"reason": "R", "message": "m", "fix": "", "metadata": {}}}, Failed),
    ],
)  # fmt: skip
def test_each_form_an_older_version_kept_is_one_class(form: Any, data: dict[str, Any], kind: type) -> None:
    outcome = form.from_json(data)
    assert type(outcome) is kind
    assert form.from_json(json.loads(json.dumps(form.to_json(outcome)))) == outcome


def test_a_step_of_no_known_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="key"):
        PLANNED.from_json({"spec": {}, "versions": {}})


MADE_OTHERWISE_NOW = {"package"}
"""Stages whose revision was raised since: what the version before made of the same inputs is other bytes."""


def test_the_keys_of_results_are_the_same_so_that_they_are_taken_over(database: sqlite3.Connection) -> None:
    (document,) = database.execute(
        "SELECT document FROM web4lora_runs WHERE request_id = 'finished'"
    ).fetchone()
    record = RunRecord.from_json(json.loads(document))
    inputs = Inputs.of(record, lambda: "{}")
    for name, stage in stages_of(inputs.pipeline).items():
        if isinstance(stage, JobStage):
            made = record.stage(name)
            same = stage.key(inputs, stage.spec(inputs), made.versions) == made.key
            assert same is (name not in MADE_OTHERWISE_NOW), name
