"""What is worked for: a run, a job. Logs, spans and calls to other services take it from here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from web4lora_chassis.telemetry import traces

RUN, JOB, TRACEPARENT = "run", "job", "traceparent"

_work: ContextVar[Mapping[str, str]] = ContextVar("web4lora_work", default={})  # noqa: B039 - never changed


def current() -> Mapping[str, str]:
    """Return the ids of what is worked for: `run`, `job`; each is missing where it is not known."""
    return _work.get()


@contextlib.contextmanager
def belongs_to(*, run: str = "", job: str = "", traceparent: str = "") -> Iterator[None]:
    """Say what the block works for; what it calls, awaits and starts as tasks does too.

    Args:
        run: The run's id; that of the block around it when empty.
        job: The job's id, likewise.
        traceparent: The W3C trace context to go on in; that of the block around it when empty.
    """
    ids = {RUN: run, JOB: job}
    token = _work.set({**_work.get(), **{name: value for name, value in ids.items() if value}})
    try:
        with traces.continued(traceparent):
            yield
    finally:
        _work.reset(token)


def origin() -> dict[str, str]:
    """Return what is worked for in a form that goes to another process: `run`, `traceparent`, where known."""
    found = {RUN: current().get(RUN, ""), TRACEPARENT: traces.traceparent()}
    return {name: value for name, value in found.items() if value}
