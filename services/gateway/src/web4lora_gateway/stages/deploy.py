"""Deploy: the first of the quantized models in a runtime, as a candidate beside what serves under the name.

Taken over only while it still serves.
"""

from __future__ import annotations

from web4.lora.v1 import deployer_pb2, packager_pb2

from web4lora_gateway.stages.base import Inputs, Ref, Stage


def _spec(inputs: Inputs) -> deployer_pb2.DeploySpec:
    package = inputs.result("package", packager_pb2.PackageResult())
    spec = deployer_pb2.DeploySpec(
        name=inputs.pipeline.name,
        gguf=package.quantized[0].artifact,
        files=package.files,
        deploy=inputs.pipeline.deploy,
    )
    spec.deploy.ClearField("promote")  # decides what comes after, not what is deployed
    return spec


def _artifacts(result: deployer_pb2.DeployResult) -> tuple[Ref, ...]:
    return (result.deployment.gguf,)


def _deployment(_: Inputs, result: deployer_pb2.DeployResult) -> deployer_pb2.Deployment:
    return result.deployment


STAGE = Stage(
    name="deploy",
    worker="deployer",
    spec=_spec,
    result=deployer_pb2.DeployResult,
    artifacts=_artifacts,
    deployment=_deployment,
)
