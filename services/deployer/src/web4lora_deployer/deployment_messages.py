"""Deployments and runtimes as messages of the contract."""

from __future__ import annotations

from collections.abc import Mapping

from web4.lora.v1 import deployer_pb2, deployments_pb2
from web4lora_chassis.rpc import ref_message

from web4lora_deployer.records.deployments import Deployment, Name
from web4lora_deployer.runtimes.base import Health, RuntimeStatus


def deployment_message(
    record: Deployment, health: Health, name: Name | None, scales: Mapping[str, float]
) -> deployments_pb2.Deployment:
    """Return a deployment and how it does as a message.

    Args:
        record: The deployment.
        health: How it does.
        name: What its name stands for; None when nothing was promoted to that.
        scales: How strongly each of its adapters is applied.
    """
    deployed = health.deployed
    promoted = name is not None and name.current == record.id
    note = name.note if name is not None and promoted else ""
    message = deployments_pb2.Deployment(
        id=record.id,
        name=record.name,
        target=record.target,
        endpoint=deployed.endpoint if deployed else record.endpoint,
        model=deployed.model if deployed else record.model,
        gguf=ref_message(record.gguf),
        state=deployments_pb2.DeploymentState.Value(f"DEPLOYMENT_STATE_{health.state}"),
        detail=health.detail or note,
        runtime_version=deployed.version if deployed else record.runtime_version,
        context_tokens=record.context_tokens,
        promoted=promoted,
        trained_system=record.trained_system,
        adapters=[
            deployments_pb2.Adapter(
                name=adapter.name, scale=scales[adapter.name], gguf=ref_message(adapter.gguf)
            )
            for adapter in record.adapters
        ],
    )
    message.create_time.FromMilliseconds(int(record.created_at * 1000))
    return message


def runtime_message(status: RuntimeStatus) -> deployer_pb2.Runtime:
    """Return what was found of a runtime as a message."""
    return deployer_pb2.Runtime(
        target=status.target,
        usable=status.usable,
        address=status.address,
        version=status.version,
        detail=status.detail,
    )
