"""The deployer's deployments through the gateway: each call of the contract, its answer and its errors."""

from __future__ import annotations

import json

import grpc
import pytest
from web4.lora.v1 import deployments_pb2
from web4lora_chassis.errors import FailedPrecondition, NotFound, Unavailable
from web4lora_chassis.rpc import error_of

CALLS = deployments_pb2.DESCRIPTOR.services_by_name["DeploymentService"].methods_by_name


def failure(call, request):
    with pytest.raises(grpc.RpcError) as raised:
        call(request, timeout=60)
    return error_of(raised.value)


def test_deployments_are_passed_on(stack):
    old, new = ({"id": f"demo:v{digit * 8}", "name": "demo", "target": "llama-server"} for digit in "12")
    for each in (old, new):
        (stack.control / f"deployment-{each['id'][6:]}.json").write_text(json.dumps(each))
    stack.start("deployer", "gateway")
    calls = stack.deployments
    listed = calls.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments
    assert [each.id for each in listed] == [old["id"], new["id"]]
    for each in (old, new):
        promoted = calls.PromoteDeployment(deployments_pb2.PromoteDeploymentRequest(id=each["id"])).deployment
        assert (promoted.id, promoted.promoted) == (each["id"], True)
    back = deployments_pb2.RollbackDeploymentRequest(name="demo", from_id=new["id"])
    assert calls.RollbackDeployment(back).deployment.id == old["id"]
    assert calls.GetDeployment(deployments_pb2.GetDeploymentRequest(id="demo")).deployment.id == old["id"]
    scaled = deployments_pb2.SetAdaptersRequest(id="demo", scales={"house": 0.5})
    assert [each.scale for each in calls.SetAdapters(scaled).deployment.adapters] == [0.5]
    calls.DeleteDeployment(deployments_pb2.DeleteDeploymentRequest(id=new["id"]))
    assert len(calls.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments) == 1


def test_errors_of_the_deployer_are_passed_on(stack):
    only = {"id": "demo:v11111111", "name": "demo"}
    (stack.control / "deployment-11111111.json").write_text(json.dumps(only))
    stack.start("deployer", "gateway")
    unknown = deployments_pb2.GetDeploymentRequest(id="nothing")
    assert isinstance(failure(stack.deployments.GetDeployment, unknown), NotFound)
    stack.deployments.PromoteDeployment(deployments_pb2.PromoteDeploymentRequest(id=only["id"]))
    back = deployments_pb2.RollbackDeploymentRequest(name="demo", from_id=only["id"])
    refused = failure(stack.deployments.RollbackDeployment, back)
    assert isinstance(refused, FailedPrecondition)
    assert refused.reason == "NO_EARLIER_CANDIDATE"


def test_without_the_deployer_every_call_says_who_is_missing(stack):
    stack.start("gateway")
    for name in CALLS:
        request = getattr(deployments_pb2, f"{name}Request")()
        away = failure(getattr(stack.deployments, name), request)
        assert isinstance(away, Unavailable), name
        assert "The deployer at" in away.message, name
