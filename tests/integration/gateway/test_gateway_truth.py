"""No run waits where it should not: callers that go away, full disks, late cancels, gateways that die."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
import uuid

import grpc
import pytest
from web4.lora.v1 import gateway_pb2

TERMINAL = (gateway_pb2.RUN_STATE_SUCCEEDED, gateway_pb2.RUN_STATE_FAILED, gateway_pb2.RUN_STATE_CANCELLED)
UNENDED = (gateway_pb2.RUN_STATE_QUEUED, gateway_pb2.RUN_STATE_RUNNING, gateway_pb2.RUN_STATE_CANCELLING)
JOBS = ["prepare", "train", "package", "deploy", "verify"]


def at(stack, stage, run_id, kind):
    return stack.until(run_id, lambda run: stage(run, kind).progress.phase == kind, f"work on {kind}")


def test_creations_that_are_cut_off_make_no_run_that_nobody_starts(stack):
    stack.start()
    pipeline = stack.pipeline()
    requests = [gateway_pb2.CreateRunRequest(pipeline=pipeline, request_id=f"cut-{n}") for n in range(20)]
    for number, request in enumerate(requests):
        with contextlib.suppress(grpc.RpcError):
            stack.api.CreateRun(request, timeout=0.002 * (number + 1))
    listed = gateway_pb2.ListRunsRequest(states=UNENDED)
    stack.wait(lambda: not stack.api.ListRuns(listed).runs, "the end of every run")
    runs = stack.api.ListRuns(gateway_pb2.ListRunsRequest()).runs
    assert {run.state for run in runs} <= {gateway_pb2.RUN_STATE_SUCCEEDED}
    assert len({run.request_id for run in runs}) == len(runs)
    again = stack.api.CreateRun(requests[-1]).run
    assert stack.finish(again.id).state == gateway_pb2.RUN_STATE_SUCCEEDED


def test_a_disk_that_is_full_for_a_while_stops_no_run(stack, stage, states):
    stack.start()
    stack.hold("train")
    run = stack.create()
    at(stack, stage, run.id, "train")
    gateway = stack.processes["gateway"].pid
    _, most = resource.prlimit(gateway, resource.RLIMIT_FSIZE)
    resource.prlimit(gateway, resource.RLIMIT_FSIZE, (0, most))
    try:
        stack.release("train")
        waiting = stack.until(run.id, lambda run: stage(run, "train").progress.phase == "wait", "waiting")
        assert "waiting for the gateway's database" in stage(waiting, "train").progress.message
        with pytest.raises(grpc.RpcError) as refused:
            stack.create()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        resource.prlimit(gateway, resource.RLIMIT_FSIZE, (most, most))
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    made = [job["kind"] for worker in ("trainer", "packager", "deployer") for job in stack.jobs(worker)]
    assert made == JOBS
    assert stack.finish(stack.create().id).state == gateway_pb2.RUN_STATE_SUCCEEDED


@pytest.mark.parametrize("killed", [False, True])
def test_a_cancel_during_promote_comes_too_late(stack, stage, states, killed):
    stack.start()
    stack.hold("promote")
    run = stack.create()
    stack.wait((stack.control / "promoting").exists, "promote to begin")
    stack.api.CancelRun(gateway_pb2.CancelRunRequest(id=run.id))
    if killed:
        stack.kill("gateway")
        stack.start("gateway")
    stack.release("promote")
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED
    assert states(last) == ["SUCCEEDED"] * 6
    promoted = stage(last, "promote").promote_result
    assert promoted.outcome == gateway_pb2.PROMOTE_OUTCOME_PROMOTED
    assert promoted.summary.endswith("The cancel came too late for that.")


def test_two_gateways_share_the_work_and_survive_each_other(stack, stage, postgresql):
    stack.env["WEB4LORA_DATABASE"] = postgresql
    other = stack.add_gateway("gateway-2")
    stack.hold("train")
    stack.start("trainer", "packager", "deployer", "gateway", "gateway-2")
    request = gateway_pb2.CreateRunRequest(pipeline=stack.pipeline(seed=1), request_id=uuid.uuid4().hex)
    ours, again = stack.api.CreateRun(request).run, other.CreateRun(request).run
    assert ours.id == again.id
    theirs = other.CreateRun(
        gateway_pb2.CreateRunRequest(pipeline=stack.pipeline(seed=2), request_id=uuid.uuid4().hex)
    ).run
    assert theirs.id != ours.id
    at(stack, stage, ours.id, "train")
    deadline = time.monotonic() + 60
    while stage(other.GetRun(gateway_pb2.GetRunRequest(id=ours.id)).run, "train").progress.phase != "train":
        assert time.monotonic() < deadline, "the other gateway shows how far the run is"
        time.sleep(0.2)
    stack.api.CancelRun(gateway_pb2.CancelRunRequest(id=theirs.id))  # the other gateway carries it on
    watched = [
        answer.run for answer in stack.api.WatchRun(gateway_pb2.WatchRunRequest(id=theirs.id), timeout=60)
    ]
    assert watched[-1].state == gateway_pb2.RUN_STATE_CANCELLED
    last = other.CreateRun(
        gateway_pb2.CreateRunRequest(pipeline=stack.pipeline(seed=3), request_id=uuid.uuid4().hex)
    ).run
    stack.kill("gateway-2")
    stack.release("train")
    for run in (ours, last):
        ended = stack.finish(run.id)
        assert ended.state == gateway_pb2.RUN_STATE_SUCCEEDED, ended.error
    trained = [job["request_id"] for job in stack.jobs("trainer") if job["kind"] == "train"]
    assert len(trained) == len(set(trained))


def test_a_gateway_that_was_stopped_finds_its_runs_taken_over(stack, stage, postgresql):
    stack.env["WEB4LORA_DATABASE"] = postgresql
    other = stack.add_gateway("gateway-2")
    stack.hold("train")
    stack.start("trainer", "packager", "deployer", "gateway", "gateway-2")
    run = stack.create()
    at(stack, stage, run.id, "train")
    stack.processes["gateway"].send_signal(signal.SIGSTOP)
    stack.release("train")
    request = gateway_pb2.GetRunRequest(id=run.id)
    stack.wait(lambda: other.GetRun(request).run.state in TERMINAL, "the run's end on the other gateway")
    stack.processes["gateway"].send_signal(signal.SIGCONT)
    last = stack.get(run.id)
    assert last == other.GetRun(request).run
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED
    assert sum(len(stack.jobs(worker)) for worker in ("trainer", "packager", "deployer")) == len(JOBS)
