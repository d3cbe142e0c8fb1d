"""Deploy: the first of the quantized models in a runtime, as a candidate beside what serves under the name.

Taken over only while it still serves.
"""

from __future__ import annotations

from web4.lora.v1 import deployer_pb2, deployments_pb2

from web4lora_gateway.stages.base import Inputs, JobStage, Ref
from web4lora_gateway.stages.package import Package
from web4lora_gateway.workers import WorkerInfo


class Deploy(JobStage[deployer_pb2.DeploySpec, deployer_pb2.DeployResult]):
    """A deploy job."""

    name = "deploy"
    worker = "deployer"
    made = deployer_pb2.DeployResult
    revision = 2  # what is served is compared with what training used
    asks_first = True

    def spec(self, inputs: Inputs) -> deployer_pb2.DeploySpec:
        """Deploy the first quantization, with the packager's advice."""
        package = inputs.of_stage(Package)
        spec = deployer_pb2.DeploySpec(
            name=inputs.pipeline.name,
            gguf=package.quantized[0].artifact,
            files=package.files,
            deploy=inputs.pipeline.deploy,
        )
        spec.deploy.ClearField("promote")  # decides what comes after, not what is deployed
        return spec

    def complete(self, spec: deployer_pb2.DeploySpec, info: WorkerInfo) -> None:
        """Name the target that the deployer is set to, where the pipeline names none."""
        if not spec.deploy.HasField("target") and info.target:
            spec.deploy.target = info.target

    def artifacts(self, result: deployer_pb2.DeployResult) -> tuple[Ref, ...]:
        """Return what is deployed."""
        return (result.deployment.gguf,)

    def deployment(self, _inputs: Inputs, result: deployer_pb2.DeployResult) -> deployments_pb2.Deployment:
        """Return what was deployed."""
        return result.deployment
