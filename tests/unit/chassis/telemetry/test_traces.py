"""Traces: ids that outlive a process, spans where there is a trace, and none without a collector."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.settings import Settings, load
from web4lora_chassis.telemetry import belongs_to, origin, traces


class Sent:
    """What an exporter was given."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        traces.export("trainer", "1", self._exporter)

    def spans(self) -> list[tuple[str, str, str]]:
        """Return each span's name, its trace's id and that of the span above it."""
        assert traces._tracer is not None
        traces._tracer.span_processor.force_flush()
        return [
            (span.name, f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}" if span.parent else "")
            for span in self._exporter.get_finished_spans()
        ]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    monkeypatch.setattr(traces, "_tracer", None)
    return Sent()


def test_without_a_collector_there_is_nothing() -> None:
    assert traces.run_traceparent("run_1", "n") == ""
    with belongs_to(run="run_1", traceparent=f"00-{'1' * 32}-{'2' * 16}-01"), traces.span("work"):
        assert origin() == {"run": "run_1"}


def test_a_run_s_trace_is_the_same_in_every_process_and_another_for_another_run(sent: Sent) -> None:
    first = traces.run_traceparent("run_1", "n")
    assert first == traces.run_traceparent("run_1", "n")
    assert (
        len(
            {first[:35], traces.run_traceparent("run_1", "m")[:35], traces.run_traceparent("run_2", "n")[:35]}
        )
        == 3
    )


def test_spans_lie_below_each_other_and_below_one_that_ends_later(sent: Sent) -> None:
    run = traces.run_traceparent("run_1", "n")
    job = traces.span_id_of("train-1", run)
    with belongs_to(run="run_1", traceparent=job), traces.span("attempt"):
        inner = traces.traceparent()
        with traces.span("phase"):
            pass
    traces.ended_span("job train", job, run, 1.0, 2.0)
    traces.ended_span("run", run, "", 0.0, 3.0)
    _, trace_id, run_id, _ = run.split("-")
    assert sent.spans() == [
        ("phase", trace_id, inner.split("-")[2]),
        ("attempt", trace_id, job.split("-")[2]),
        ("job train", trace_id, run_id),
        ("run", trace_id, ""),
    ]


def test_what_belongs_to_no_trace_leaves_no_span(sent: Sent) -> None:
    with traces.span("list runs"):
        assert traces.traceparent() == ""
    with belongs_to(traceparent="not one"), traces.span("odd"):
        pass
    traces.ended_span("job train", traces.span_id_of("train-1", ""), "", 1.0, 2.0)
    assert sent.spans() == []


def test_traces_without_the_library_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(FailedPrecondition) as caught:
        traces.start("trainer", "1", "http://127.0.0.1:4317")
    assert "[telemetry]" in caught.value.fix


def test_an_endpoint_without_a_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB4LORA_TRACES_ENDPOINT", "localhost:4317")
    with pytest.raises(InvalidInput, match="WEB4LORA_TRACES_ENDPOINT"):
        load(Settings)
