"""Several trainers behind the real gateway: who gets which run, pause, drain and a trainer that is lost."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.rpc import error_of

WORKERS = ("trainer", "packager", "deployer")


@pytest.fixture
def two(stack):
    """A stack with a second trainer, gpu-1, which has a state folder of its own and shares the store."""
    stack.add_trainer("gpu-1")
    stack.env["WEB4LORA_TRAINER_GRACE_SECONDS"] = "1"
    stack.start(*WORKERS, "gpu-1", "gateway")
    stack.wait(
        lambda: all(each.HasField("seen_time") for each in trainers(stack)), "both trainers to be seen"
    )
    return stack


def trainers(stack) -> list[gateway_pb2.TrainerStatus]:
    return list(stack.api.ListTrainers(gateway_pb2.ListTrainersRequest()).trainers)


def allow(stack, name: str, mode: str) -> gateway_pb2.TrainerStatus:
    request = gateway_pb2.SetTrainerModeRequest(name=name, mode=f"TRAINER_MODE_{mode}")
    return stack.api.SetTrainerMode(request).trainer


def trained(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("trainer/jobs/train-*")]


def test_two_trainers_share_the_runs_and_a_lost_ones_run_begins_anew_on_the_other(two, stage):
    two.hold("train")
    runs = [two.create(two.pipeline(seed=seed)) for seed in (1, 2)]
    for run in runs:
        two.until(run.id, lambda run: stage(run, "train").progress.phase == "train", "training")
    assert [len(each.runs) for each in trainers(two)] == [1, 1]
    moved = trainers(two)[1].runs[0]
    two.kill("gpu-1")
    waiting = two.until(
        moved, lambda run: stage(run, "train").state == gateway_pb2.STAGE_STATE_QUEUED, "to wait again"
    )
    assert waiting.state == gateway_pb2.RUN_STATE_QUEUED
    two.release("train")
    for run in runs:
        assert two.finish(run.id).state == gateway_pb2.RUN_STATE_SUCCEEDED
    assert len(trained(two.root / "home")) == 2
    log = (two.outputs / moved / "logs" / "run.log").read_text()
    assert "gpu-1 is out of reach since" in log
    assert "begins anew" in log
    assert trainers(two)[1].HasField("lost_time")


def test_device_asked_for_pause_and_drain(two, stage):
    assert [each.name for each in trainers(two)] == ["trainer", "gpu-1"]
    nowhere = two.create(device="cuda")
    said = two.until(nowhere.id, lambda run: stage(run, "prepare").progress.message, "a reason")
    assert stage(said, "prepare").progress.message == "waiting: no trainer has the device cuda"
    assert said.state == gateway_pb2.RUN_STATE_QUEUED
    two.api.CancelRun(gateway_pb2.CancelRunRequest(id=nowhere.id))
    assert two.finish(nowhere.id).state == gateway_pb2.RUN_STATE_CANCELLED

    assert allow(two, "gpu-1", "DRAINING").mode == gateway_pb2.TRAINER_MODE_DRAINING
    two.hold("train")
    run = two.create(device="stand-in", priority="PRIORITY_HIGH")
    assert run.priority == gateway_pb2.PRIORITY_HIGH
    two.until(run.id, lambda run: stage(run, "train").progress.phase == "train", "training")
    allow(two, "trainer", "PAUSED")
    paused = two.until(run.id, lambda run: "is paused" in stage(run, "train").progress.message, "the pause")
    assert paused.state == gateway_pb2.RUN_STATE_QUEUED
    two.release("train")
    two.kill("gateway")
    two.start("gateway")
    two.wait(lambda: trainers(two)[0].mode == gateway_pb2.TRAINER_MODE_PAUSED, "the mode, over a restart")
    allow(two, two.addresses["trainer"], "ACTIVE")
    last = two.finish(run.id)
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    assert len(trained(two.root / "home")) == 2
    for name, mode, error in (("nobody", "PAUSED", NotFound), ("trainer", "UNSPECIFIED", InvalidInput)):
        with pytest.raises(grpc.RpcError) as raised:
            allow(two, name, mode)
        assert isinstance(error_of(raised.value), error)
