"""Traces by OpenTelemetry, which is imported only once the settings name a collector.

A span is made where there is a trace to be part of, and nowhere else: calls that belong to no run leave none.
Ids of what outlives a process, a run and a job, are digests of their names: whoever goes on after a restart
goes on in the same trace.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from web4lora_chassis.errors import FailedPrecondition

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

# A job waits for its child's end, and that for its last spans: a collector that is away must not hold it up.
_EXPORT_SECONDS = 2
_NANOSECONDS = 1_000_000_000

_tracer: Tracer | None = None
_ids: ContextVar[tuple[int, int]] = ContextVar("web4lora_ids", default=(0, 0))
"""Ids that the next trace and span are to have; 0: any."""


def start(service: str, version: str, endpoint: str) -> None:
    """Send this process's spans to a collector from now on.

    Args:
        service: Who makes them: trainer.
        version: Its version.
        endpoint: The collector's OTLP address over gRPC: http://127.0.0.1:4317, https:// for TLS.

    Raises:
        FailedPrecondition: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise FailedPrecondition(
            "WEB4LORA_TRACES_ENDPOINT is set, and OpenTelemetry is not installed.",
            fix="pip install 'web4lora-chassis[telemetry]', or unset the variable.",
            reason="TELEMETRY_MISSING",
        ) from error
    export(service, version, OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS))


def export(service: str, version: str, exporter: SpanExporter) -> None:
    """Give this process's spans to an exporter from now on."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        """Takes the ids that a trace and a span are to have, where they are to have certain ones."""

        def generate_trace_id(self) -> int:
            return _ids.get()[0] or super().generate_trace_id()

        def generate_span_id(self) -> int:
            return _ids.get()[1] or super().generate_span_id()

    global _tracer
    resource = Resource.create({"service.name": f"web4lora-{service}", "service.version": version})
    provider = TracerProvider(resource=resource, id_generator=Ids())
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("web4lora")


def run_traceparent(run_id: str, nonce: str) -> str:
    """Return the trace context of a run, to which all its work belongs; empty when nothing is traced.

    Args:
        run_id: The run.
        nonce: Its own, for its id may come again with a new database.
    """
    if _tracer is None:
        return ""
    name = f"{run_id} {nonce}"
    return f"00-{_digest(name, 16):032x}-{_digest(name, 8):016x}-01"


def traceparent() -> str:
    """Return the W3C trace context of the span at work; empty when there is none."""
    if _tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


@contextlib.contextmanager
def continued(parent: str) -> Iterator[None]:
    """Go on in a trace context that came from another process; an empty or a wrong one changes nothing."""
    if _tracer is None or not parent:
        yield
        return
    from opentelemetry import context as contexts
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    token = contexts.attach(TraceContextTextMapPropagator().extract({"traceparent": parent}))
    try:
        yield
    finally:
        contexts.detach(token)


@contextlib.contextmanager
def span(name: str, kind: str = "INTERNAL", **attributes: str | int | float) -> Iterator[None]:
    """Make a span of the block, where there is a trace. An exception that leaves it marks it as failed.

    Args:
        name: What is done, of few different values: "work train".
        kind: INTERNAL, CLIENT or SERVER.
        attributes: What else is known, by name; `__` in a name stands for a dot.
    """
    if _tracer is None or not traceparent():
        yield
        return
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span(name, kind=SpanKind[kind], attributes=_dotted(attributes)):
        yield


def span_id_of(name: str, parent: str) -> str:
    """Return the trace context of the span that `ended_span` makes of a name, for the spans below it."""
    if _tracer is None or not parent:
        return ""
    return f"{parent[:36]}{_digest(name, 8):016x}-01"


def ended_span(
    name: str, own: str, parent: str, began: float, ended: float, failure: str = "", **attributes: str | int
) -> None:
    """Make a span of what has ended, perhaps begun by a process before this one.

    Args:
        name: As for `span`.
        own: Its own trace context, as from `run_traceparent` or `span_id_of`; nothing is done when empty.
        parent: That of the span above it; empty: it is the trace's root.
        began: Seconds since 1970.
        ended: Seconds since 1970.
        failure: Why it failed; empty when it did not.
        attributes: As for `span`.
    """
    if _tracer is None or not own:
        return
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        Status,
        StatusCode,
        TraceFlags,
        set_span_in_context,
    )

    trace_id, span_id = _parts(own)
    above = Context()
    if parent:
        flags = TraceFlags(TraceFlags.SAMPLED)
        context = SpanContext(*_parts(parent), is_remote=True, trace_flags=flags)
        above = set_span_in_context(NonRecordingSpan(context), above)
    token = _ids.set((trace_id, span_id))
    try:
        made = _tracer.start_span(
            name, above, attributes=_dotted(attributes), start_time=int(began * _NANOSECONDS)
        )
    finally:
        _ids.reset(token)
    if failure:
        made.set_status(Status(StatusCode.ERROR, failure))
    made.end(end_time=int(ended * _NANOSECONDS))


def _parts(traceparent: str) -> tuple[int, int]:
    """Return the ids of the trace and of the span that a trace context names."""
    _, trace_id, span_id, _ = traceparent.split("-")
    return int(trace_id, 16), int(span_id, 16)


def _digest(name: str, size_bytes: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:size_bytes], "big") or 1


def _dotted(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in attributes.items()}
