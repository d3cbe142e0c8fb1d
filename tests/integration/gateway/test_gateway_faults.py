"""The gateway and its workers killed, stopped and cancelled at bad moments."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2


def at(stack, stage, run_id, kind):
    return stack.until(run_id, lambda run: stage(run, kind).progress.phase == kind, f"work on {kind}")


@pytest.mark.parametrize("kind", ["prepare", "train", "verify"])
def test_a_killed_gateway_goes_on_with_the_same_job(stack, stage, states, kind):
    stack.start()
    stack.hold(kind)
    run = stack.create()
    before = at(stack, stage, run.id, kind)
    stack.kill("gateway")
    stack.start("gateway")
    after = at(stack, stage, run.id, kind)
    assert stage(after, kind).job_id == stage(before, kind).job_id
    assert after.revision > before.revision
    stack.release(kind)
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    assert states(last) == ["SUCCEEDED"] * 6
    made = [job["kind"] for worker in ("trainer", "packager", "deployer") for job in stack.jobs(worker)]
    assert made == ["prepare", "train", "package", "deploy", "verify"]


def test_killed_again_and_again_it_ends_with_the_same_artifacts(stack, stage):
    stack.start()
    whole = stack.finish(stack.create().id)
    run = stack.create(from_stage="STAGE_NAME_PREPARE")
    for _ in range(4):
        stack.kill("gateway")
        stack.start("gateway")
        seen = stack.get(run.id).revision
        stack.until(run.id, lambda run, seen=seen: run.revision > seen or run.end_time.seconds, "news")
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    assert stage(last, "train").train_result.adapter == stage(whole, "train").train_result.adapter
    assert stage(last, "package").package_result == stage(whole, "package").package_result
    assert len(stack.jobs("trainer")) == 4
    assert len(stack.jobs("packager")) == 2
    assert len(stack.jobs("deployer")) == 4


def test_a_stopped_gateway_leaves_the_run_at_work(stack, stage):
    stack.start()
    stack.hold("train")
    run = stack.create()
    at(stack, stage, run.id, "train")
    assert stack.kill("gateway", signal.SIGTERM) == 0
    assert [job["state"] for job in stack.jobs("trainer")] == ["SUCCEEDED", "RUNNING"]
    stack.release("train")
    stack.start("gateway")
    assert stack.finish(run.id).state == gateway_pb2.RUN_STATE_SUCCEEDED
    assert "Traceback" not in stack.log
    assert "dbos" not in stack.log


def test_a_worker_that_is_down_is_waited_for(stack, stage):
    stack.start("packager", "deployer", "gateway")
    run = stack.create()
    waiting = stack.until(run.id, lambda run: stage(run, "prepare").progress.message, "a message")
    address = stack.addresses["trainer"]
    assert stage(waiting, "prepare").progress.message == f"waiting for the trainer at {address} …"
    assert stage(waiting, "prepare").state == gateway_pb2.STAGE_STATE_RUNNING
    stack.hold("train")
    stack.start("trainer")
    job_id = stage(at(stack, stage, run.id, "train"), "train").job_id
    stack.kill("trainer")
    waiting = stack.until(
        run.id,
        lambda run: stage(run, "train").progress.message.startswith("waiting for the trainer"),
        "waiting",
    )
    stack.start("trainer")
    stack.release("train")
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    assert stage(last, "train").job_id == job_id


def test_cancel_stops_the_job(stack, stage, states):
    stack.start()
    stack.hold("train")
    run = stack.create()
    at(stack, stage, run.id, "train")
    answer = stack.api.CancelRun(gateway_pb2.CancelRunRequest(id="latest")).run
    assert answer.state == gateway_pb2.RUN_STATE_CANCELLING
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_CANCELLED
    assert states(last) == ["SUCCEEDED", "CANCELLED", "PENDING", "PENDING", "PENDING", "PENDING"]
    assert [job["state"] for job in stack.jobs("trainer")] == ["SUCCEEDED", "CANCELLED"]
    facts = json.loads((stack.outputs / run.id / "run.json").read_text())
    assert facts["state"] == "CANCELLED"
    again = stack.api.CancelRun(gateway_pb2.CancelRunRequest(id=run.id)).run
    assert again == last

    stack.release("train")
    retried = stack.api.RetryRun(gateway_pb2.RetryRunRequest(id=run.id)).run
    assert states(stack.finish(retried.id)) == ["REUSED"] + ["SUCCEEDED"] * 5


def test_a_cancel_outlives_the_gateway(stack, stage):
    stack.start()
    stack.hold("train")
    run = stack.create()
    at(stack, stage, run.id, "train")
    stack.processes["trainer"].send_signal(signal.SIGSTOP)  # so that the cancel can't be delivered at once
    stack.api.CancelRun(gateway_pb2.CancelRunRequest(id=run.id))
    stack.kill("gateway")
    stack.processes["trainer"].send_signal(signal.SIGCONT)
    stack.start("gateway")
    assert stack.finish(run.id).state == gateway_pb2.RUN_STATE_CANCELLED
    stack.wait(lambda: stack.jobs("trainer")[1]["state"] == "CANCELLED", "the job's end")


def test_a_cancel_ends_while_the_worker_is_away_and_is_delivered_once_it_is_back(stack, stage):
    stack.start()
    stack.hold("train")
    run = stack.create()
    at(stack, stage, run.id, "train")
    stack.kill("trainer")
    stack.api.CancelRun(gateway_pb2.CancelRunRequest(id=run.id))
    last = stack.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_CANCELLED
    assert "as soon as it is back" in stage(last, "train").progress.message
    stack.start("trainer")
    stack.wait(lambda: stack.jobs("trainer")[1]["state"] == "CANCELLED", "the job's end")


def test_a_second_gateway_on_the_same_state_refuses_to_start(stack):
    stack.start("gateway")
    first = stack.processes.pop("gateway")
    stack.addresses["gateway"] = stack.env["WEB4LORA_GATEWAY_ADDRESS"] = "127.0.0.1:0"
    with pytest.raises(AssertionError, match="Another gateway works with"):
        stack.start("gateway")
    stack.processes["gateway"] = first


def test_runs_of_the_version_before_are_shown_and_go_on(stack, stage, states):
    before = Path(__file__).parents[2] / "earlier_state"
    (stack.root / "home" / "gateway").mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(stack.root / "home" / "gateway" / "gateway.sqlite")) as database:
        database.executescript((before / "gateway.sql").read_text())
    for path in before.glob("train-*.json"):
        folder = stack.root / "home" / "trainer" / "jobs" / path.stem
        folder.mkdir(parents=True)
        shutil.copy(path, folder / "job.json")
    stack.pipeline()  # brings data and suite into the store
    stack.start()
    left, finished = stack.api.ListRuns(gateway_pb2.ListRunsRequest()).runs
    assert states(finished) == ["SUCCEEDED"] * 6
    assert stage(finished, "train").train_result.final_loss == 0.5
    last = stack.finish(left.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    assert states(last) == ["SUCCEEDED"] * 6
    assert stage(last, "train").job_id == "train-20261126-180951-ce7e755d"
    assert [job["attempt"] for job in stack.jobs("trainer")] == [1, 2]
