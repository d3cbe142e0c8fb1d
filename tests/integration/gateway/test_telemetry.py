"""What is seen of a run from outside: one trace over all services, metrics of each, logs with its id."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from web4.lora.v1 import gateway_pb2

from tests.collector import Collector, Span, collecting

STAGES = ("prepare", "train", "package", "deploy", "verify", "promote")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


def free_port() -> int:
    """Return the first of four ports in a row that nobody listens on."""
    for port in range(19461, 29461, 4):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(4):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port + number))
            return port
    raise AssertionError("no four ports in a row are free")


def whole(stack, collector: Collector, *, runs: int = 1) -> list[Span]:
    """Return the spans once as many runs' roots, and all that they are above, were sent."""

    def complete() -> bool:
        with collector.lock:
            known = {span.span_id for span in collector.spans}
            roots = [span for span in collector.spans if not span.parent_id]
            return len(roots) >= runs and all(
                span.parent_id in known for span in collector.spans if span.parent_id
            )

    stack.wait(complete, "the whole trace", lambda: "\n".join(map(str, collector.spans)))
    return list(collector.spans)


def test_a_run_is_one_trace_over_all_services(stack, collector: Collector) -> None:
    stack.env["WEB4LORA_TRACES_ENDPOINT"] = collector.endpoint
    stack.start()
    run = stack.finish(stack.create().id)
    assert run.state == gateway_pb2.RUN_STATE_SUCCEEDED
    stack.api.ListRuns(gateway_pb2.ListRunsRequest())  # belongs to no run: leaves no span
    spans = whole(stack, collector)
    assert len({span.trace_id for span in spans}) == 1
    [root] = [span for span in spans if not span.parent_id]
    assert (root.service, root.name, root.failed) == ("web4lora-gateway", "run", False)
    assert root.attributes["run"] == run.id
    steps = {span.name for span in spans if span.parent_id == root.span_id}
    assert steps == {"begin", "end"} | {
        f"{step} {stage}" for stage in STAGES for step in ("plan", "work", "conclude")
    }
    assert {span.service for span in spans} == {f"web4lora-{name}" for name in stack.addresses}
    by_id = {span.span_id: span for span in spans}
    for kind, worker in (("train", "trainer"), ("package", "packager"), ("verify", "deployer")):
        [job] = [span for span in spans if span.name == f"job {kind}"]
        assert job.service == f"web4lora-{worker}"
        [phase] = [span for span in spans if span.name == kind]
        above = [phase]
        while above[-1].parent_id:
            above.append(by_id[above[-1].parent_id])
        assert [span.name for span in above[1:]] == [
            "attempt",
            f"job {kind}",
            "web4.lora.v1.JobService/CreateJob",  # as the worker answered it
            "web4.lora.v1.JobService/CreateJob",  # as the gateway made it
            f"work {kind}",
            "run",
        ]


def test_a_restarted_gateway_goes_on_in_the_same_trace(stack, collector: Collector) -> None:
    stack.env["WEB4LORA_TRACES_ENDPOINT"] = collector.endpoint
    stack.hold("train")
    stack.start()
    run = stack.create()
    stack.until(run.id, lambda run: run.stages[1].progress.phase == "train", "training")
    stack.wait(lambda: any(span.name == "plan train" for span in collector.spans), "the first spans")
    stack.kill("gateway", signal.SIGKILL)
    stack.release("train")
    stack.start("gateway")
    stack.finish(run.id)
    stack.wait(lambda: any(span.name == "run" for span in collector.spans), "the root")
    assert len({span.trace_id for span in collector.spans}) == 1
    names = [span.name for span in collector.spans]
    assert names.count("plan prepare") == 1, "a step that was done is not done again"
    assert names.count("job train") == 1


def test_a_run_that_failed_is_a_trace_that_says_so(stack, collector: Collector) -> None:
    stack.env["WEB4LORA_TRACES_ENDPOINT"] = collector.endpoint
    (stack.control / "fail-train").write_text("no memory")
    stack.start()
    stack.finish(stack.create().id)
    spans = whole(stack, collector)
    failed = {span.name for span in spans if span.failed}
    assert failed == {"run", "job train", "attempt"}


def test_a_collector_that_is_away_holds_nothing_up(stack) -> None:
    stack.env["WEB4LORA_TRACES_ENDPOINT"] = "http://127.0.0.1:1"
    stack.start()
    assert stack.finish(stack.create().id).state == gateway_pb2.RUN_STATE_SUCCEEDED


def test_logs_are_lines_of_json_with_run_and_job(stack) -> None:
    stack.env["WEB4LORA_LOG_FORMAT"] = "json"
    stack.start()
    (stack.control / "fail-package").write_text("no memory")
    run = stack.finish(stack.create().id)
    lines = [json.loads(line) for line in stack.log.splitlines()]
    [failed] = [line for line in lines if "package failed" in line["message"]]
    assert (failed["service"], failed["run"], failed["level"]) == ("gateway", run.id, "WARNING")
    [job] = stack.jobs("packager")
    text = (stack.root / "packager.log").read_text()
    [failed] = [line for line in map(json.loads, text.splitlines()) if "failed" in line["message"]]
    assert (failed["run"], failed["job"]) == (run.id, job["id"])


def test_every_service_shows_its_metrics(stack) -> None:
    first = free_port()
    stack.env["WEB4LORA_METRICS_ADDRESS"] = f"127.0.0.1:{first}"
    stack.start()
    stack.finish(stack.create().id)
    stack.hold("train")
    held = stack.create(stack.pipeline(seed=3))
    stack.until(held.id, lambda run: run.stages[1].progress.phase == "train", "training")

    def read(number: int) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{first + number}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    gateway, trainer = read(0), read(1)
    assert gateway['web4lora_runs{state="RUNNING"}'] == 1
    assert gateway['web4lora_stages_running{stage="train"}'] == 1
    assert gateway['web4lora_runs_ended_total{state="SUCCEEDED"}'] == 1
    assert gateway['web4lora_stage_seconds_count{stage="verify",state="SUCCEEDED"}'] == 1
    create = 'web4lora_rpc_seconds_count{code="OK",method="web4.lora.v1.GatewayService/CreateRun"}'
    assert gateway[create] == 2
    assert trainer['web4lora_jobs{state="RUNNING"}'] == 1
    assert trainer['web4lora_job_memory_bytes{kind="train"}'] > 1e6
    assert trainer['web4lora_job_seconds_count{kind="train",state="SUCCEEDED"}'] == 1
    assert trainer['web4lora_store_bytes_total{direction="in"}'] > 0, "what the job's process stored counts"
    assert {name for name in read(2) if re.match(r"web4lora_jobs\b", name)}
    assert {name for name in read(3) if re.match(r"web4lora_jobs\b", name)}
    stack.release("train")
    stack.finish(held.id)
