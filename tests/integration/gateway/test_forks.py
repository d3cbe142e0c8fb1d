"""A fork through the real gateway: changed parameters, finished stages with the same inputs taken over."""

from __future__ import annotations

import grpc
import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc import error_of


def test_a_fork_takes_over_what_its_changes_do_not_touch(stack, states, stage):
    stack.start()
    pipeline = stack.pipeline()
    pipeline.base.model = "/models/mine"  # by that name alone nothing is taken over, but from the run itself
    sweep = {"sweep": "sweep-1", "sweep_values": {"train.epochs": "1"}, "priority": "PRIORITY_LOW"}
    first = stack.finish(stack.create(pipeline, **sweep).id)
    assert first.state == gateway_pb2.RUN_STATE_SUCCEEDED, first.error
    assert (first.sweep, dict(first.sweep_values)) == ("sweep-1", {"train.epochs": "1"})

    changed = gateway_pb2.Pipeline()
    changed.CopyFrom(first.pipeline)
    changed.package.quantizations[:] = ["Q8_0"]
    request = gateway_pb2.RetryRunRequest(id=first.id, pipeline=changed, request_id="fork")
    forked = stack.finish(stack.api.RetryRun(request).run.id)
    assert states(forked) == ["REUSED", "REUSED", "SUCCEEDED", "SUCCEEDED", "SUCCEEDED", "SUCCEEDED"]
    assert stage(forked, "prepare").reused_from_run == first.id
    assert (forked.forked_from, forked.sweep) == (first.id, "")
    assert forked.priority == gateway_pb2.PRIORITY_LOW
    assert stack.api.RetryRun(request).run.id == forked.id

    changed.train.epochs = 2
    trained = stack.finish(
        stack.api.RetryRun(gateway_pb2.RetryRunRequest(id=forked.id, pipeline=changed)).run.id
    )
    assert states(trained)[:2] == ["SUCCEEDED", "SUCCEEDED"], "the training to come is an input of prepare"

    changed.train.epochs = -1
    with pytest.raises(grpc.RpcError) as raised:
        stack.api.RetryRun(gateway_pb2.RetryRunRequest(id=first.id, pipeline=changed))
    assert isinstance(error_of(raised.value), InvalidInput)
    for wrong in ({"sweep": "no such form"}, {"device": "x" * 65}, {"sweep_values": {"x": "y" * 201}}):
        with pytest.raises(grpc.RpcError) as raised:
            stack.create(pipeline, **wrong)
        assert error_of(raised.value).metadata["field"] == next(iter(wrong))
