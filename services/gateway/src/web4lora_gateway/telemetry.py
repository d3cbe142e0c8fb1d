"""What is seen of runs from outside: the trace that a run is, its metrics, and its id in the log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import sqlalchemy as sa
from web4lora_chassis.telemetry import belongs_to, metrics, traces

from web4lora_gateway.database import RUNS
from web4lora_gateway.records import RunRecord, RunState, StageRecord


def belongs_to_run(record: RunRecord) -> contextlib.AbstractContextManager[None]:
    """Say that the block works for a run: its lines, its calls and the jobs that they make belong to it."""
    return belongs_to(run=record.id, traceparent=_traceparent(record))


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Make a span of a step of a run; one that was done before a restart is in the trace already."""
    verb, _, stage = name.partition(" ")
    with contextlib.ExitStack() as stack:
        stack.enter_context(traces.span(name))
        if verb == "work":
            stack.enter_context(metrics.STAGES_RUNNING.labels(stage).track_inprogress())
        yield


def stage_ended(stage: StageRecord) -> None:
    """Count a stage that ended."""
    ended = stage.ended_at or time.time()
    metrics.STAGE_SECONDS.labels(stage.name, stage.state).observe(ended - (stage.started_at or ended))


def run_ended(record: RunRecord) -> None:
    """Count a run that ended, and make the span that all of it is below."""
    metrics.RUNS_ENDED.labels(record.state).inc()
    traces.ended_span(
        "run",
        _traceparent(record),
        "",
        record.created_at,
        record.ended_at,
        record.error.message if record.error else "",
        run=record.id,
        pipeline=str(record.pipeline.get("name", "")),
        state=record.state,
    )


def runs_shown(database: sa.Engine) -> contextlib.AbstractContextManager[None]:
    """Show how many runs of the database have not ended, by state, while the block runs."""
    query = sa.select(RUNS.c.state, sa.func.count()).where(~RUNS.c.ended).group_by(RUNS.c.state)

    def look() -> dict[str, float]:
        with database.connect() as connection:
            found = {state: count for state, count in connection.execute(query)}
        return {str(state): found.get(state, 0) for state in RunState if not state.terminal}

    return metrics.shown(metrics.RUNS, look)


def _traceparent(record: RunRecord) -> str:
    return traces.run_traceparent(record.id, record.nonce)
